"""How readings look: rows of a name and figures, some with a bar."""

from collections.abc import Iterator
from itertools import pairwise
from math import inf

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from vllm_sink.top.readings import CONFIG, NOTHING, Interval, Reading

OURS = "vllm_sink:"
STREAMS, SESSION = OURS + "streams", OURS + "session_"
STATES = ("decoding", "reading", "waiting", "preempted")
NO_SINKS = "No metrics of vllm_sink: this vLLM server has neither sinks nor sessions."
FIGURES, BAR = 30, 28
"""Characters, where there is a bar."""

Row = tuple[str, RenderableType]


def view(url: str, interval: Interval, failure: str = "") -> RenderableType:
    """A `failure` is one sentence, above what was read before it."""
    now = interval.now
    models = ", ".join(sorted(now.models))
    title = Text(f"{url}  model {models}  engines {len(now.engines)}", "bold")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    for row in rows(interval):
        grid.add_row(*row)
    shown = Group(title, grid) if now.has(OURS) else Group(title, Text(NO_SINKS, "yellow"), grid)
    return Group(Text(failure, "bold red"), Styled(shown, "dim")) if failure else shown


def rows(interval: Interval) -> Iterator[Row]:
    now = interval.now
    if now.has(STREAMS):
        yield from of_streams(interval)
    yield from of_vllm(interval)
    if now.has(SESSION):
        yield from of_sessions(interval)
    yield from positions(now)


def of_streams(interval: Interval) -> Iterator[Row]:
    count = interval.now.by("state", STREAMS)
    evicted = rate(interval, OURS + "kv_blocks_evicted_total")
    compactions = rate(interval, OURS + "compactions_total")
    anew = rate(interval, OURS + "compaction_tokens_total")
    yield "streams", "  ".join(f"{state} {count.get(state, 0):,.0f}" for state in STATES)
    yield "compactions", f"{compactions}  tokens read anew {anew}"
    yield "evictions", f"blocks {evicted}"


def of_vllm(interval: Interval) -> Iterator[Row]:
    """What a stock server tells as well."""
    generated = rate(interval, "vllm:generation_tokens_total")
    prompts = rate(interval, "vllm:prompt_tokens_total")
    prefixes = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
    hits, all_hits = (i.ratio(*prefixes) for i in (interval, Interval(NOTHING, interval.now)))
    held, pool = blocks(interval.now)
    yield "tokens", f"generated {generated}  of prompts {prompts}"
    yield "KV blocks", with_bar(f"held {held:,.0f} of {pool:,.0f}", held, pool)
    yield "prefix cache", f"hit rate {percent(hits)}  since the start {percent(all_hits)}"


def of_sessions(interval: Interval) -> Iterator[Row]:
    now = interval.now
    turns, hits, misses, conflicts, refusals = (
        f"{name} {now.total(f'{SESSION}{name}_total'):,.0f}"
        for name in ("turns", "hits", "misses", "conflicts", "refusals")
    )
    statuses = now.by("status", SESSION + "refusals_total")
    why = ", ".join(f"{status}: {n:,.0f}" for status, n in statuses.items() if n)
    commit = interval.ratio(SESSION + "commit_seconds_sum", SESSION + "commit_seconds_count")
    yield "sessions", f"{turns}  {rate(interval, SESSION + 'turns_total')}  {hits}  {misses}"
    yield "", f"{conflicts}  {refusals}{why and f' ({why})'}"
    yield "", f"mean commit {'-' if commit is None else f'{1000 * commit:,.1f} ms'}"


def positions(now: Reading) -> Iterator[Row]:
    """From the first bucket that has streams to the last; none where nothing runs."""
    bounds = now.by("le", OURS + "stream_position_bucket").items()
    up_to = [(0.0, 0.0), *sorted((float(bound), streams) for bound, streams in bounds)]
    counts = [(bound, streams - fewer) for (_, fewer), (bound, streams) in pairwise(up_to)]
    taken = [place for place, (_, streams) in enumerate(counts) if streams]
    most = max((streams for _, streams in counts), default=0)
    for place in range(taken[0], taken[-1] + 1) if taken else ():
        bound, streams = counts[place]
        name = "farther" if bound == inf else f"up to {bound:,.0f}"
        title = "positions" if place == taken[0] else ""
        yield title, with_bar(f"{name:<18}{streams:,.0f}", streams, most)


def blocks(now: Reading) -> tuple[float, float]:
    """KV blocks that requests hold, and all that they could.

    vLLM's front end tells the blocks of its engines together, with each engine's label
    (vllm/v1/engine/core_client.py); each has one that is never used.
    """
    engines = len(now.engines)
    pool = int(now.samples(CONFIG)[0].labels["num_gpu_blocks"]) - engines
    if now.has(STREAMS):
        return now.total(OURS + "kv_blocks_held"), pool
    return now.total("vllm:kv_cache_usage_perc") / engines * pool, pool


def with_bar(figures: str, part: float, whole: float) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=FIGURES)
    grid.add_row(figures, ProgressBar(whole, part, BAR))
    return grid


def rate(interval: Interval, counter: str) -> str:
    value = interval.rate(counter)
    return "-" if value is None else f"{value:,.1f}/s"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"

"""What compactions do to perplexity, and what share of decoding they take, for several marks.

Quality: the tokens of a book after each compaction of a stream, against the same tokens of the
stream uncompacted. A prompt is never compacted, so the one is read as a prompt of the compacted
buffer and these tokens, the other as the whole text.
Cost: the time to read S + W tokens anew for each of several streams, over that of the steps from
one compaction to the next. Whether that is all shows a stream decoded through some compactions.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import cli, results
from benchmarks.harness.engine import Engine, Worker
from benchmarks.texts.likelihood import perplexity, ratio
from benchmarks.texts.passages import passages
from benchmarks.texts.reading import CHUNK, DTYPE, reader
from benchmarks.texts.tokens import book_tokens
from vllm_sink import cpu, embedded
from vllm_sink.buffer import Buffer

SINKS = 4
ENGINE = {"max_model_len": 2**20, "max_num_batched_tokens": 2048}
"""Of those that decode."""

console = Console()


@dataclass(frozen=True)
class Reading:
    """A text of so many `tokens`, and the `after` tokens that follow each compaction on the way."""

    buffer: Buffer
    tokens: int
    after: int
    soon: int
    """Those right after it."""

    @property
    def places(self) -> range:
        """Tokens of the stream as it is compacted."""
        period = self.buffer.mark - self.buffer.kept
        return range(self.buffer.mark, self.tokens - self.after + 1, period)

    def nlls(self, model: Path, text: list[int]) -> tuple[list[list[float]], list[list[float]]]:
        """After each compaction: compacted, and uncompacted."""
        with reader(model, self.tokens, sink(self.buffer)) as worker:
            whole = worker.run(Engine.nll, text[: self.tokens], CHUNK, "uncompacted")
            compacted = []
            for place in self.places:
                tokens = self.buffer.compact(text[:place]) + text[place : place + self.after]
                nll = worker.run(Engine.nll, tokens, CHUNK, f"compacted at {place:,}")
                compacted.append(nll[-self.after :])
        return compacted, [whole[place - 1 :][: self.after] for place in self.places]


@dataclass(frozen=True)
class Timing:
    """Turns of reading S + W = `cache` tokens and of decoding, for each number of streams."""

    cache: int = 1024
    streams: tuple[int, ...] = (1, 8)
    marks: tuple[int, ...] = (4, 8, 16, 32)
    """In multiples of S + W."""
    rounds: int = 5
    steps: int = 32


@dataclass(frozen=True)
class Crossing:
    """One stream decoded through so many compactions, its prompt as long as what each leaves."""

    buffer: Buffer
    compactions: int

    @property
    def period(self) -> int:
        """Steps from one compaction to the next."""
        return self.buffer.mark - self.buffer.kept


@dataclass(frozen=True)
class Plan:
    quality: Reading
    cost: Timing
    crossing: Crossing


def buffer(cache: int, multiple: int) -> Buffer:
    return Buffer(SINKS, cache - SINKS, multiple * cache)


PLAN = Plan(
    Reading(buffer(1024, 2), tokens=33_000, after=500, soon=50),
    Timing(),
    Crossing(buffer(64, 16), compactions=4),
)
QUICK = Plan(
    Reading(buffer(64, 2), tokens=600, after=50, soon=10),
    Timing(cache=64, streams=(1, 2), rounds=2, steps=8),
    Crossing(buffer(64, 2), compactions=2),
)


def quality(model: Path, text: list[int], plan: Reading) -> dict[str, Any]:
    return across(plan, *plan.nlls(model, text))


def across(
    plan: Reading, compacted: list[list[float]], uncompacted: list[list[float]]
) -> dict[str, Any]:
    """Perplexity compacted over uncompacted. For its standard error each compaction is one sample:
    the tokens after it have its buffer in common."""
    ours, other = ([fmean(nll) for nll in nlls] for nlls in (compacted, uncompacted))
    soon = ([fmean(nll[: plan.soon]) for nll in nlls] for nlls in (compacted, uncompacted))
    return {
        "compacted": round(perplexity(ours), 3),
        "uncompacted": round(perplexity(other), 3),
        "ratio": ratio(ours, other),
        "soon": ratio(*soon),
        "points": [
            {"tokens": place, "ratio": round(math.exp(a - b), 4)}
            for place, a, b in zip(plan.places, ours, other, strict=True)
        ],
    }


def cost(model: Path, text: list[int], plan: Timing) -> list[dict[str, Any]]:
    rows = []
    with decoder(model, buffer(plan.cache, 2), max(plan.streams)) as worker:
        for streams in plan.streams:
            reads: list[float] = []
            steps: list[float] = []
            for _ in track(range(plan.rounds), f"{streams} at once", console=console):
                prompts = passages(text, streams, plan.cache)
                reads.append(1000 * worker.run(Engine.time_prompt, prompts[0]))
                worker.run(Engine.fill, prompts)
                steps.append(1000 * median(worker.run(Engine.time_steps, plan.steps)))
            rows.append(shares(plan, streams, reads, steps))
    return rows


def shares(plan: Timing, streams: int, reads: list[float], steps: list[float]) -> dict[str, Any]:
    """Of decode time, in which all streams are compacted once a period, one after the other."""
    ratios = [read / step for read, step in zip(reads, steps, strict=True)]
    all_read = streams * median(ratios)
    return {
        "streams": streams,
        "read_ms": results.spread(reads, 1),
        "step_ms": results.spread(steps, 1),
        "read_over_step": results.spread(ratios, 2),
        "share": {str(k): round(all_read / ((k - 1) * plan.cache), 5) for k in plan.marks},
    }


def crossing(model: Path, text: list[int], plan: Crossing) -> dict[str, Any]:
    """Next to each step that compacts, another engine reads as many tokens."""
    prompt = text[: plan.buffer.kept]
    reads: list[float] = []
    seconds: list[float] = []
    with (
        decoder(model, plan.buffer, streams=1) as worker,
        decoder(model, plan.buffer, streams=1) as other,
    ):
        other.run(Engine.time_prompt, prompt)
        worker.run(Engine.fill, [prompt])
        for _ in track(range(plan.compactions), "through compactions", console=console):
            seconds += worker.run(Engine.time_steps, plan.period - 1)
            reads.append(other.run(Engine.time_prompt, prompt))
            seconds += worker.run(Engine.time_steps, 1)
    return crossed(plan, reads, seconds)


def crossed(plan: Crossing, reads: list[float], seconds: list[float]) -> dict[str, Any]:
    """The share of the steps that compact, and what reading a prompt says it would be."""
    compacting = seconds[plan.period - 1 :: plan.period]
    step = median(seconds)
    return {
        "read_ms": [round(1000 * one, 1) for one in reads],
        "compacting_ms": [round(1000 * one, 1) for one in compacting],
        "step_ms": round(1000 * step, 2),
        "share": round(median(compacting) / (plan.period * step), 5),
        "expected": round(median(reads) / (plan.period * step), 5),
    }


def decoder(model: Path, buffer: Buffer, streams: int) -> Worker:
    return Worker(
        model,
        pinned=True,
        dtype=cpu.fast_dtype(),
        max_num_seqs=streams,
        additional_config={"sink": sink(buffer)},
        **ENGINE,
    )


def sink(buffer: Buffer) -> dict[str, int]:
    return {
        "sink_tokens": buffer.sinks,
        "window_tokens": buffer.window,
        "compact_tokens": buffer.mark,
    }


def show(plan: Plan, found: dict[str, Any]) -> None:
    seen, crossed = found["quality"], found["crossing"]
    for count, name in ((plan.quality.after, "ratio"), (plan.quality.soon, "soon")):
        console.print(
            f"{count} tokens after each of {len(seen['points'])} compactions, over uncompacted: "
            "perplexity {ratio:.4f}, standard error {standard_error:.4f}.".format(**seen[name])
        )
    table = Table("streams", "reading over a step", *(f"mark {k}x" for k in plan.cost.marks))
    for row in found["cost"]:
        table.add_row(
            str(row["streams"]),
            f"{row['read_over_step']['median']:.1f}",
            *(f"{100 * share:.2f} %" for share in row["share"].values()),
        )
    console.print(table)
    console.print(
        f"Decoded through {plan.crossing.compactions} compactions: they took "
        f"{100 * crossed['share']:.2f} %, expected were {100 * crossed['expected']:.2f} %."
    )


def main() -> None:
    options = cli.parser(__doc__, resumable=True).parse_args()
    plan = QUICK if options.quick else PLAN
    model = embedded.path()
    text = book_tokens(model, PLAN.quality.tokens)
    parts: dict[str, Callable[[], Any]] = {
        "quality": partial(quality, model, text, plan.quality),
        "cost": partial(cost, model, text, plan.cost),
        "crossing": partial(crossing, model, text, plan.crossing),
    }
    path = cli.folder(options) / "compaction.json"
    setup = {
        "model": model.name,
        "dtype": {"quality": DTYPE, "cost": cpu.fast_dtype()},
        "engine": ENGINE,
        **asdict(plan),
    }
    found = results.stored(path, setup, options.fresh) or {"setup": setup}
    for name, measure in parts.items():
        if name not in found:
            found[name] = measure()
            results.write(path, "benchmarks.compaction", found)
    show(plan, found)


if __name__ == "__main__":
    cli.run(main)

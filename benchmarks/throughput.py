"""How many tokens a second many long streams get from one server, and how long each waits.

For 1, 2, 4, ... clients at once, in each of these arms:

    sink       this project: S sinks and a window of W
    window     this project: a window of S + W alone
    dense      stock vLLM: contexts grow
    recompute  stock vLLM: each client sends its last S + W tokens again after every 64, and its
               time to first token is what the stream waits each time
    llamacpp   llama.cpp's server with context shift, on the 4-bit weights that the others widen

All vLLM servers have the same KV pool. Each server is asked once for more than the model's trained
context. A point is written as soon as it is measured, and not measured again unless --fresh or the
setup changed.
"""

import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks import cli, load, results, servers, venvs
from benchmarks.text import book_tokens
from vllm_sink import cpu, embedded
from vllm_sink.geometry import Geometry

console = Console()


@dataclass(frozen=True)
class Plan:
    arms: tuple[str, ...]
    clients: int
    """At once, at most."""
    geometry: Geometry
    workload: load.Workload
    long_prompt_tokens: int | None
    """More than the trained context; None is not to ask."""

    def shape(self) -> servers.Shape:
        return servers.Shape(embedded.path(), cpu.fast_dtype(), self.clients, self.geometry)

    def setup(self) -> dict[str, Any]:
        """Of all that is not an arm's own."""
        shape = self.shape()
        return {
            **asdict(shape),
            "model": shape.model.name,
            "pool_blocks": shape.pool_blocks,
            "block_tokens": servers.BLOCK,
            "workload": asdict(self.workload),
            "long_prompt_tokens": self.long_prompt_tokens,
            "seed": load.SEED,
        }


PLAN = Plan(
    arms=tuple(servers.ARMS),
    clients=16,
    # Streams of three times S + W: the contexts of 16 dense ones outgrow the pool.
    geometry=Geometry(sinks=4, window=252),
    workload=load.Workload(prompt_tokens=128, output_tokens=640, resent_every=64),
    long_prompt_tokens=9_000,
)
QUICK = Plan(
    arms=("sink", "recompute", "llamacpp"),
    clients=2,
    geometry=Geometry(sinks=4, window=60),
    workload=load.Workload(prompt_tokens=32, output_tokens=96, resent_every=32),
    long_prompt_tokens=None,
)


@dataclass(frozen=True)
class Sweep:
    """One arm, from where an earlier run left it."""

    name: str
    server: Callable[[], AbstractContextManager[servers.Target]]
    kept_tokens: int | None
    """Where a client truncates its context."""
    plan: Plan
    figures: dict[str, Any]
    """As written."""

    @property
    def complete(self) -> bool:
        asked = self.plan.long_prompt_tokens is None or "past_trained_context" in self.figures
        return asked and not self.next_clients()

    def next_clients(self) -> int | None:
        points = self.figures["points"]
        if not points:
            return 1
        last: int = points[-1]["clients"]
        return min(2 * last, self.plan.clients) if last < self.plan.clients else None

    def run(self, tokens: list[int], save: Callable[[], None]) -> None:
        with console.status(f"{self.name}: starting") as status, self.server() as target:
            target.check()
            while clients := self.next_clients():
                status.update(f"{self.name}: clients {clients}")
                self.figures["points"].append(self.measure(target, tokens, clients))
                save()
            if not self.complete:
                status.update(f"{self.name}: past the trained context")
                self.figures["past_trained_context"] = self.ask_for_more(target, tokens)
                save()

    def measure(self, target: servers.Target, tokens: list[int], clients: int) -> dict[str, Any]:
        workload = self.plan.workload
        earlier = sum(point["clients"] for point in self.figures["points"])
        every = load.draw(tokens, self.plan.clients, workload.stream_tokens)
        drawn = every[earlier : earlier + clients]
        requests = [workload.requests(passage, self.kept_tokens) for passage in drawn]
        seen = load.run(target.url, target.model, requests)
        if seen["errors"]:
            target.check()
        console.print(f"{self.name}, clients {clients}: {seen['output_tokens_s']} tokens/s")
        return {"clients": clients, **seen, "memory_mib": target.memory_mib()}

    def ask_for_more(self, target: servers.Target, tokens: list[int]) -> dict[str, Any]:
        prompt = tokens[: self.plan.long_prompt_tokens]
        sent = prompt[-self.kept_tokens :] if self.kept_tokens else prompt
        answer = target.ask(load.text(sent), 8)
        message = "ok" if answer.is_success else answer.text
        return {"prompt_tokens": len(sent), "status": answer.status_code, "message": message}


def show(arms: dict[str, dict[str, Any]]) -> None:
    table = Table(box=SIMPLE, padding=0, caption="first and next tokens: ms")
    table.add_column("arm")
    numbers = ("clients", "tokens/s", "first p50", "p99", "next p50", "p99")
    for heading in (*numbers, "errors", "preempted", "KV pool", "MiB"):
        table.add_column(heading.replace(" ", "\n"), justify="right")
    for name, arm in arms.items():
        for point in arm["points"]:
            waits = (point[of][p] for of in ("ttft_ms", "inter_token_ms") for p in ("p50", "p99"))
            table.add_row(
                name,
                number(point["clients"]),
                number(point["output_tokens_s"], ".1f"),
                *map(number, waits),
                number(point["errors"]),
                number(point["preemptions"]),
                number(point["kv_usage_peak"], ".0%"),
                number(point["memory_mib"]),
            )
        table.add_section()
    console.print(table)
    for name, arm in arms.items():
        if answer := arm.get("past_trained_context"):
            told = f"{name}, asked to go on after {answer['prompt_tokens']:,} tokens"
            console.print(f"{told}: {answer['message']}", markup=False, highlight=False)


def number(value: float | None, form: str = ",.0f") -> str:
    return "" if value is None else format(value, form)


def sweeps(url: str | None, plan: Plan, arms: dict[str, dict[str, Any]]) -> Iterator[Sweep]:
    """Of the server at `url` alone, or of all arms of the plan, which take turns."""
    if url:
        figures = arms.setdefault("url", {"points": []})
        yield Sweep("url", lambda: nullcontext(servers.found(url)), None, plan, figures)
        return
    shape = plan.shape()
    for name in plan.arms:
        figures = arms.setdefault(name, {"points": []})
        kept = shape.cache_tokens if servers.ARMS[name].truncates else None
        yield Sweep(name, partial(servers.running, name, shape), kept, plan, figures)


def parse() -> tuple[Namespace, Plan]:
    parser = cli.parser(__doc__, resumable=True)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--arms", nargs="+", choices=servers.ARMS, help="default: all of them")
    which.add_argument("--url", help="measure this server alone, as http://host:port")
    for name, what in (
        ("clients", "most clients at once"),
        ("prompt-tokens", "of a stream"),
        ("output-tokens", "of a stream"),
    ):
        parser.add_argument(f"--{name}", type=cli.positive, metavar="N", help=what)
    options = parser.parse_args()
    plan = QUICK if options.quick else PLAN
    sizes = {
        name: getattr(options, name) or getattr(plan.workload, name)
        for name in ("prompt_tokens", "output_tokens")
    }
    plan = replace(
        plan,
        arms=tuple(options.arms or plan.arms),
        clients=options.clients or plan.clients,
        workload=replace(plan.workload, **sizes),
    )
    if plan.workload.stream_tokens > load.LONGEST_STREAM:
        parser.error(
            f"--prompt-tokens and --output-tokens: {plan.workload.stream_tokens:,} together, "
            f"accepted up to {load.LONGEST_STREAM:,}, of real text"
        )
    return options, plan


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options, plan = parse()
    venvs.python("load")
    if "llamacpp" in plan.arms and not options.url:
        venvs.python("llamacpp")
    setup = plan.setup() | ({"url": options.url} if options.url else {})
    path = cli.folder(options) / ("throughput-url.json" if options.url else "throughput.json")
    arms = (results.stored(path, setup, options.fresh) or {"arms": {}})["arms"]
    tokens = book_tokens(embedded.path())

    def save() -> None:
        results.write(path, "benchmarks.throughput", {"setup": setup, "arms": arms})

    for sweep in sweeps(options.url, plan, arms):
        if sweep.complete:
            console.print(f"{sweep.name}: already in {path}")
        else:
            try:
                sweep.run(tokens, save)
            except cli.BenchmarkError as error:
                kept = f" What was measured before is in {path}." if path.exists() else ""
                raise cli.BenchmarkError(f"{sweep.name}: {error}{kept}") from error
    show(arms)


if __name__ == "__main__":
    cli.run(main)

"""How many tokens a second many long streams get from one server, and how long each waits.

For 1, 2, 4, ... clients at once, these arms take turns:

    sink       this project: S sinks and a window of W
    window     this project: a window of S + W alone
    dense      stock vLLM: contexts grow
    recompute  stock vLLM: each client sends its last S + W tokens again after every 64, and its
               time to first token is what the stream waits each time
    llamacpp   llama.cpp's server with context shift, on the 4-bit weights that the others widen

All servers are up all the time, and one at a time has clients; those of vLLM have the same KV pool.
At most clients the turns are repeated, and the arms compared round by round. Each server is asked
once for more than the model's trained context. A point is written as soon as it is measured, and
not measured again unless --fresh, the setup or the code changed; a run that is broken off and goes
on later has its rounds that far apart, and without the servers that had finished.
"""

import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.status import Status
from rich.table import Table

from benchmarks.harness import cli, load, results, servers, venvs
from benchmarks.harness.floors import BYTES
from benchmarks.texts.passages import SEED, draw
from benchmarks.texts.tokens import book_tokens
from vllm_sink import cpu, embedded
from vllm_sink.geometry import Geometry

console = Console()


@dataclass(frozen=True)
class Plan:
    arms: tuple[str, ...]
    clients: int
    """At once, at most."""
    rounds: int
    """With most clients."""
    geometry: Geometry
    workload: load.Workload
    long_prompt_tokens: int | None
    """More than the trained context; None is not to ask."""

    def turns(self) -> list[int]:
        """Clients at once."""
        fewer = [2**power for power in range((self.clients - 1).bit_length())]
        return fewer + [self.clients] * self.rounds

    def shape(self) -> servers.Shape:
        return servers.Shape(embedded.path(), cpu.fast_dtype(), self.clients, self.geometry)

    def setup(self) -> dict[str, Any]:
        """Of all that is not an arm's own."""
        shape = self.shape()
        return {
            **asdict(shape),
            "model": shape.model.name,
            "rounds": self.rounds,
            "pool_blocks": shape.pool_blocks,
            "block_tokens": servers.BLOCK,
            "workload": asdict(self.workload),
            "long_prompt_tokens": self.long_prompt_tokens,
            "seed": SEED,
        }


PLAN = Plan(
    arms=tuple(servers.ARMS),
    clients=16,
    rounds=3,
    # Streams of three times S + W: the contexts of 16 dense ones outgrow the pool.
    geometry=Geometry(sinks=4, window=252),
    workload=load.Workload(prompt_tokens=128, output_tokens=640, resent_every=64),
    long_prompt_tokens=9_000,
)
QUICK = Plan(
    arms=("sink", "recompute", "llamacpp"),
    clients=2,
    rounds=1,
    geometry=Geometry(sinks=4, window=60),
    workload=load.Workload(prompt_tokens=32, output_tokens=256, resent_every=32),
    long_prompt_tokens=None,
)


@dataclass(frozen=True)
class Sweep:
    """One arm, from where an earlier run left it."""

    name: str
    target: servers.Target
    kept_tokens: int | None
    """Where a client truncates its context."""
    figures: dict[str, Any]
    """As written."""

    def measure(self, workload: load.Workload, passages: list[list[int]]) -> None:
        """With a client a passage."""
        requests = [workload.requests(passage, self.kept_tokens) for passage in passages]
        seen = load.run(self.target.url, self.target.model, requests)
        if seen["errors"]:
            self.target.check()
        clients = len(passages)
        console.print(f"{self.name}, clients {clients}: {seen['output_tokens_s']} tokens/s")
        point = {"clients": clients, **seen, "memory_mib": self.target.memory_mib()}
        self.figures["points"].append(point)

    def ask_for_more(self, prompt: list[int]) -> None:
        """Than the trained context."""
        sent = prompt[-self.kept_tokens :] if self.kept_tokens else prompt
        answer = self.target.ask(load.text(sent), 8)
        message = "ok" if answer.is_success else answer.text
        told = {"prompt_tokens": len(sent), "status": answer.status_code, "message": message}
        self.figures["past_trained_context"] = told


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """Errors begin with the arm's name."""
    try:
        yield
    except cli.BenchmarkError as error:
        raise cli.BenchmarkError(f"{name}: {error}") from error


def run(
    sweeps: list[Sweep], plan: Plan, tokens: list[int], save: Callable[[], None], status: Status
) -> None:
    """Measure, arm by arm, what is missing of each turn."""
    drawn = draw(tokens, plan.turns(), plan.workload.stream_tokens)
    for turn, passages in enumerate(drawn):
        for sweep in sweeps:
            if len(sweep.figures["points"]) <= turn:
                status.update(f"{sweep.name}: clients {len(passages)}")
                with blamed(sweep.name):
                    sweep.measure(plan.workload, passages)
                save()
    for sweep in sweeps:
        if plan.long_prompt_tokens and "past_trained_context" not in sweep.figures:
            status.update(f"{sweep.name}: past the trained context")
            with blamed(sweep.name):
                sweep.ask_for_more(tokens[: plan.long_prompt_tokens])
            save()


def complete(figures: dict[str, Any], plan: Plan) -> bool:
    asked = plan.long_prompt_tokens is None or "past_trained_context" in figures
    return asked and len(figures["points"]) == len(plan.turns())


def sink_over(arms: dict[str, dict[str, Any]], plan: Plan) -> dict[str, dict[str, float]]:
    """Tokens a second of `sink` over each other arm's in the rounds with most clients."""
    rates = {
        name: [point["output_tokens_s"] for point in arm["points"][-plan.rounds :]]
        for name, arm in arms.items()
        if complete(arm, plan)
    }
    ours = rates.pop("sink", [])
    return {
        name: results.spread([a / b for a, b in zip(ours, theirs, strict=True)])
        for name, theirs in rates.items()
        if all(ours) and all(theirs) and ours
    }


def weights_mb(shape: servers.Shape) -> dict[str, int]:
    """What a step reads of weights at least, however many streams it serves."""
    checkpoint = sum(file.stat().st_size for file in shape.model.glob("*.safetensors"))
    widened = checkpoint * BYTES[shape.dtype] / BYTES["bfloat16"]
    quantised = embedded.gguf().stat().st_size
    return {"vllm": round(widened / 1e6), "llamacpp": round(quantised / 1e6)}


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


def serve(
    url: str | None, plan: Plan, arms: dict[str, dict[str, Any]], stack: ExitStack, status: Status
) -> list[Sweep]:
    """A sweep of each arm that is not complete, or of the server at `url` alone."""
    if url:
        with blamed("url"):
            return [Sweep("url", servers.found(url), None, arms.setdefault("url", {"points": []}))]
    shape = plan.shape()
    sweeps = []
    for name in plan.arms:
        figures = arms.setdefault(name, {"points": []})
        if not complete(figures, plan):
            status.update(f"{name}: starting")
            with blamed(name):
                target = stack.enter_context(servers.running(name, shape))
                target.check()
            kept = shape.cache_tokens if servers.ARMS[name].truncates else None
            sweeps.append(Sweep(name, target, kept, figures))
    return sweeps


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
        figures = {
            "setup": setup,
            "weights_mb": weights_mb(plan.shape()),
            "arms": arms,
            "sink_over": sink_over(arms, plan),
        }
        results.write(path, "benchmarks.throughput", figures)

    try:
        with console.status("") as status, ExitStack() as stack:
            run(serve(options.url, plan, arms, stack, status), plan, tokens, save, status)
    except cli.BenchmarkError as error:
        kept = f" What was measured before is in {path}." if path.exists() else ""
        raise cli.BenchmarkError(f"{error}{kept}") from error
    show(arms)
    for name, ratio in sink_over(arms, plan).items():
        console.print(f"sink over {name}, clients {plan.clients}: {ratio}")


if __name__ == "__main__":
    cli.run(main)

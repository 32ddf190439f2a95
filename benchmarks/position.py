"""Far down a stream a step costs what it costs near its start, and so does the stream's memory.

Two engines with the same tiny random Llama take turns: the stream of one is at position 4,000, that
of the other farther down. Then they change roles, so that no difference between two processes is
taken for one between two positions. Neither compacts its stream.

With --tokens, one request to a real server goes on for so many tokens, compacted on the way.
"""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.harness import cli, endless, results, tiny
from benchmarks.harness.engine import Engine, State, Worker

SINK = {"sink": {"sink_tokens": 4, "window_tokens": 508, "compact_tokens": 2**20}}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 2**20,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 2048,
    "num_gpu_blocks_override": 64,
    "disable_log_stats": False,
}

console = Console()


@dataclass(frozen=True)
class Plan:
    near: int = 4_000
    far: tuple[int, ...] = (32_000, 200_000, 1_000_000)
    rounds: int = 20
    """Turns at each position, for each assignment of roles."""
    steps: int = 50
    """Steps in a turn."""


QUICK = Plan(near=1_000, far=(10_000,), rounds=2)


@dataclass
class Place:
    """What was seen at one position."""

    steps_ms: list[float] = field(default_factory=list)
    """The median of each turn."""
    states: list[State] = field(default_factory=list)
    """For each assignment of roles; the second time, both processes have been far."""

    def summary(self) -> dict[str, Any]:
        return {
            "step_ms": results.spread(self.steps_ms),
            "kv_blocks": [state.kv_blocks for state in self.states],
            "rss_mib": [state.rss_mib for state in self.states],
        }


@dataclass
class Pair:
    """The same turns near the start and at the position `far`."""

    far: int
    at_near: Place = field(default_factory=Place)
    at_far: Place = field(default_factory=Place)

    def summary(self) -> dict[str, Any]:
        ratios = [b / a for a, b in zip(self.at_near.steps_ms, self.at_far.steps_ms, strict=True)]
        return {
            "position": self.far,
            "near": self.at_near.summary(),
            "far": self.at_far.summary(),
            "ratio": results.spread(ratios),
        }


def measure(plan: Plan, far: int) -> dict[str, Any]:
    pair = Pair(far)
    with (
        tiny.llama() as model,
        Worker(model, additional_config=SINK, pinned=True, **ENGINE) as a,
        Worker(model, additional_config=SINK, pinned=True, **ENGINE) as b,
        Progress(console=console) as progress,
    ):
        task = progress.add_task("", total=2 * plan.rounds)
        for near_worker, far_worker in ((a, b), (b, a)):
            turns = ((pair.at_near, near_worker, plan.near), (pair.at_far, far_worker, far))
            for _, worker, position in turns:
                progress.update(task, description=f"reading {position:,} tokens")
                worker.run(Engine.fill, [tiny.tokens(position)])
            progress.update(task, description=f"stepping from {far:,}")
            for _ in range(plan.rounds):
                for place, worker, _ in turns:
                    seconds = worker.run(Engine.time_steps, plan.steps)
                    place.steps_ms.append(1000 * median(seconds))
                progress.advance(task)
            for place, worker, _ in turns:
                place.states.append(worker.run(Engine.state))
    return pair.summary()


def show(plan: Plan, pairs: list[dict[str, Any]]) -> None:
    table = Table("position", "step ms: min", "median", "max", "KV blocks", "RSS MiB")
    for pair in pairs:
        for position, place in ((plan.near, pair["near"]), (pair["position"], pair["far"])):
            milliseconds = (f"{value:.3f}" for value in place["step_ms"].values())
            table.add_row(
                f"{position:,}", *milliseconds, str(place["kv_blocks"]), str(place["rss_mib"])
            )
        table.add_row("ratio", *(f"{value:.3f}" for value in pair["ratio"].values()))
        table.add_section()
    console.print(table)


def main() -> None:
    parser = cli.parser(__doc__, resumable=True)
    parser.add_argument("--tokens", type=cli.positive, help="of one request to a real server")
    options = parser.parse_args()
    if options.tokens:
        endless.run(cli.folder(options) / "endless.json", options.tokens, options.fresh, console)
        return
    plan = QUICK if options.quick else Plan()
    path = cli.folder(options) / "position.json"
    setup = {"model": tiny.MODEL, "seed": tiny.SEED, "engine": ENGINE, **SINK, **asdict(plan)}
    pairs = (results.stored(path, setup, options.fresh) or {"pairs": []})["pairs"]
    for far in plan.far[len(pairs) :]:
        pairs.append(measure(plan, far))
        results.write(path, "benchmarks.position", {"setup": setup, "pairs": pairs})
    show(plan, pairs)


if __name__ == "__main__":
    cli.run(main)

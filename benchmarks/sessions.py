"""What a turn of a session costs: far down, against sending a history anew, in stores, when idle.

Position: turns at position 4,000 and 1,000,000 of sessions take turns, with buffers of one length,
found in the prefix cache or not, of a tiny model; and such turns of a real one, near the beginning.
Histories: one conversation through sessions, and by clients who send all messages each time, also
to stock vLLM and to llama.cpp's server. Stores: turns a second and the time to commit one. Idle:
what 100,000 sessions take of memory, of a disk, and of a turn's time.
"""

import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import cli, names, results, tiny, venvs
from benchmarks.turns import asking, commits, idle, places, resending
from vllm_sink import cpu, embedded
from vllm_sink.buffer import Buffer

KV_BYTES = {"kv-cache-memory-bytes": 2**30}

console = Console()


@dataclass(frozen=True)
class Plan:
    position: places.Plan
    times: places.Plan
    """Of a real model."""
    histories: resending.Plan
    stores: commits.Plan
    idle: idle.Plan


BUFFER = Buffer(4, 1020, 4096)
PLAN = Plan(
    places.Plan(Buffer(4, 508, 2048), positions=(4_000, 1_000_000), rounds=200),
    places.Plan(BUFFER, positions=(8_000,), rounds=5),
    resending.Plan(BUFFER, turns=44, question=150, answer=50, stretch=10),
    commits.Plan(buffered=(1024, 4096, 16_384), tasks=(1, 16), seconds=5),
    idle.Plan(BUFFER, sessions=(0, 10_000, 100_000), calls=50),
)
SMALL = Buffer(4, 60, 256)
QUICK = Plan(
    places.Plan(SMALL, positions=(600, 5_000), rounds=2, piece=1_000),
    places.Plan(SMALL, positions=(600,), rounds=1),
    resending.Plan(SMALL, turns=3, question=30, answer=8, stretch=1),
    commits.Plan(buffered=(64,), tasks=(1, 4), seconds=0.2),
    idle.Plan(SMALL, sessions=(500,), calls=3),
)


def position(plan: places.Plan) -> list[dict[str, Any]]:
    with tiny.llama(speaks=True) as model:
        return at_places(model, plan)


def times(plan: places.Plan) -> list[dict[str, Any]]:
    return at_places(embedded.path(), plan)


def at_places(model: Path | str, plan: places.Plan) -> list[dict[str, Any]]:
    settings = {"dtype": cpu.fast_dtype(), **KV_BYTES}
    with (
        console.status(f"turns at {', '.join(map('{:,}'.format, plan.positions))}"),
        asking.server(model, plan.buffer, **settings) as target,
    ):
        return places.measure(target, plan)


def show(found: dict[str, Any]) -> None:
    table = Table("position", "buffer", "", "computed", "first token, ms", "over the first place")
    for row in [*found["position"], *found["times"]]:
        ratios = [None, *(ratio["median"] for ratio in row["ratios"])]
        for place, ratio in zip(row["places"], ratios, strict=True):
            table.add_row(
                f"{place['position']:,}",
                f"{row['buffered']:,}",
                row["kind"],
                f"{place['computed_tokens']:,}",
                f"{place['first_ms']['median']:.1f}",
                "" if ratio is None else f"{ratio:.3f}",
            )
    console.print(table)
    table = Table("arm", "turns", "first token over session's", "last turns over first ones")
    for name, compared in found["histories"]["over_session"]["arms"].items():
        turns = len(found["histories"]["arms"][name]["turns"])
        ratio, growth = compared["ratio"]["median"], compared["last_over_first"]
        table.add_row(names.of(name), str(turns), f"{ratio:.2f}", f"{growth:.2f}")
    console.print(table)
    table = Table("store", "buffer", "at once", "turns/s", "commit, ms: p50", "p99")
    for row in found["stores"]["rows"]:
        commit = map(str, row["commit_ms"].values())
        at_once = (f"{row['buffered']:,}", str(row["tasks"]), f"{row['turns_s']:,.0f}")
        table.add_row(row["store"], *at_once, *commit)
    console.print(table)
    table = Table("idle", "API server, MiB", "engine", "first token, ms", "list", "file, MB")
    for row in found["idle"]["sqlite"]:
        memory = (str(row[f"{name}_mib"]) for name in ("front_end", "engine"))
        medians = (str(row[name]["median"]) for name in ("turn_first_ms", "get_sessions_ms"))
        table.add_row(f"{row['sessions']:,}", *memory, *medians, str(row["file_mb"]))
    console.print(table)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = cli.parser(__doc__, resumable=True).parse_args()
    venvs.python("llamacpp")
    plan = QUICK if options.quick else PLAN
    parts: dict[str, Callable[[], Any]] = {
        "position": partial(position, plan.position),
        "times": partial(times, plan.times),
        "histories": partial(resending.measure, plan.histories, console),
        "stores": partial(commits.measure, plan.stores, console),
        "idle": partial(idle.measure, plan.idle, console),
    }
    path = cli.folder(options) / "sessions.json"
    setup = {
        "model": embedded.path().name,
        "dtype": cpu.fast_dtype(),
        "tiny": {"position": tiny.MODEL, "idle": tiny.MODEL | idle.MODEL},
        **asdict(plan),
    }
    found = results.stored(path, setup, options.fresh) or {"setup": setup}
    for name, measure in parts.items():
        if name not in found:
            found[name] = measure()
            results.write(path, "benchmarks.sessions", found)
    show(found)


if __name__ == "__main__":
    cli.run(main)

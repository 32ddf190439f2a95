"""What replicas on Ray Serve give and cost: two against one, a request's way, and affinity.

All on one machine, with real clients, of a tiny model. Cost: a small request through Ray, to one
replica, takes turns with the same request to a server without Ray. Throughput: the same turns of
sessions that are all with one replica, shared evenly by two, or with that server, and who takes the
CPU. Affinity: turns of sessions that stay with their replica, and of others that go wherever there
is less to do, where a KV pool has room for all of them and for half.
"""

import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import cli, fleet, names, results, servers, tiny
from benchmarks.harness.fleet import Fleet
from benchmarks.harness.servers import Target
from benchmarks.turns import asking, routed, sharing, staying
from benchmarks.turns.sharing import Work
from vllm_sink.buffer import Buffer

MODEL = {"max_position_embeddings": 1024}
STREAMS = 16
"""That a server runs at once."""

console = Console()


@dataclass(frozen=True)
class Plan:
    buffer: Buffer
    pool_blocks: int
    """Of each replica."""
    cost: routed.Plan
    throughput: sharing.Plan
    affinity: staying.Plan

    def flags(self, model: str, store: Path) -> dict[str, Any]:
        """Of each server."""
        return {
            "model": model,
            "session-store": f"sqlite:{store}",
            "block-size": servers.BLOCK,
            "num-gpu-blocks-override": self.pool_blocks,
            **asking.sizes(self.buffer),
        }


PLAN = Plan(
    Buffer(4, 1020, 4096),
    # For the sinks and windows of 16 sessions, which are what a turn has to find.
    pool_blocks=640,
    cost=routed.Plan(at_once=(1, 8), requests=25, rounds=10),
    throughput=sharing.Plan(
        sessions=16, works={"writing": Work(2, 16, 128), "reading": Work(2, 1_500, 4)}, rounds=5
    ),
    affinity=staying.Plan(sessions=(6, 32), first=2_500, question=150, answer=8, turns=6, rounds=3),
)
QUICK = Plan(
    Buffer(4, 60, 256),
    pool_blocks=200,
    cost=routed.Plan(at_once=(1, 2), requests=3, rounds=2),
    throughput=sharing.Plan(sessions=2, works={"writing": Work(1, 16, 16)}, rounds=1),
    affinity=staying.Plan(sessions=(2,), first=100, question=30, answer=4, turns=3, rounds=1),
)


def measure(plan: Plan, found: dict[str, Any], save: Callable[[], None]) -> None:
    """What there is not yet."""
    with ExitStack() as stack:
        model = stack.enter_context(tiny.llama(speaks=True, **MODEL))
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        with console.status("replicas start, and a server without Ray"):
            replicas, straight = servers_of(plan, model, scratch, stack)
        targets = {"straight": straight, "one": replicas.target}
        parts: dict[str, tuple[int, Callable[[], Any]]] = {
            "cost": (1, partial(routed.measure, targets, plan.cost)),
            "throughput": (2, partial(sharing.measure, replicas, straight, plan.throughput)),
            "affinity": (2, partial(staying.measure, replicas, plan.affinity)),
        }
        for name, (number, part) in parts.items():
            if name not in found:
                with console.status(f"{name}, replicas: {number}"):
                    replicas.scale(number)
                    found[name] = part()
                save()


def servers_of(plan: Plan, model: str, scratch: Path, stack: ExitStack) -> tuple[Fleet, Target]:
    flags = plan.flags(model, scratch / "of-replicas")
    replicas = stack.enter_context(fleet.running(STREAMS, flags))
    flags = plan.flags(model, scratch / "straight") | {"max-num-seqs": STREAMS}
    straight = stack.enter_context(asking.server(buffer=plan.buffer, **flags))
    return replicas, straight


def show(found: dict[str, Any]) -> None:
    table = Table("requests at once", "", "ms: p50", "p95")
    for row in found["cost"]:
        for arm, ms in row["ms"].items():
            cells = (f"{ms[p]['median']:.1f}" for p in ("p50", "p95"))
            table.add_row(str(row["at_once"]), names.of(arm), *cells)
    console.print(table)
    table = Table("work", "", "tokens/s", "over one replica", "cores")
    for row in found["throughput"]["rows"]:
        for arm, seen in row["arms"].items():
            figures = (f"{seen['tokens_s']['median']:,.0f}", f"{seen['over_one']['median']:.2f}")
            cores = ", ".join(f"{part} {taken:.2f}" for part, taken in seen["cores"].items())
            table.add_row(row["work"], names.of(arm), *figures, cores)
    console.print(table)
    table = Table("sessions", "", "first token, ms: p50", "p95", "found in the cache")
    for row in found["affinity"]:
        for arm, seen in row["arms"].items():
            first = (f"{ms:.1f}" for ms in seen["first_ms"].values())
            found_cached = f"{seen['hit_rate']:.0%}"
            table.add_row(str(row["sessions"]), names.of(arm), *first, found_cached)
    console.print(table)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = cli.parser(__doc__, resumable=True).parse_args()
    plan = QUICK if options.quick else PLAN
    setup = {"model": tiny.MODEL | MODEL, "ray": version("ray"), **asdict(plan)}
    path = cli.folder(options) / "replicas.json"
    found = results.stored(path, setup, options.fresh) or {"setup": setup}
    if not {"cost", "throughput", "affinity"} <= found.keys():
        measure(plan, found, partial(results.write, path, "benchmarks.replicas", found))
    show(found)


if __name__ == "__main__":
    cli.run(main)

"""A simulation of a million sessions on up to 1,000 replicas behind Ray Serve's own hash ring.

The router's code says which replica a session has. That replica's KV pool has the blocks of those
of its sessions that speak most; a turn of any other, and of one that has just moved, reads its
buffer again. Rows are encoded as stores keep them, and rates of Redis are those that `python -m
benchmarks.sessions` measured. The rest is arithmetic on the plan: nothing is served.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import cli, results, ring
from benchmarks.harness.ring import Hashes, Owners, Ring
from benchmarks.texts.tokens import book_tokens
from benchmarks.turns.commits import session_of
from vllm_sink import embedded
from vllm_sink.buffer import Buffer
from vllm_sink.geometry import Geometry
from vllm_sink.settings import MARK, SinkSettings

MEASURED = cli.COMMITTED / "sessions.json"

console = Console()


@dataclass(frozen=True)
class Plan:
    sessions: int = 1_000_000
    replicas: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    virtual_nodes: tuple[int, ...] = (100, 1000)
    """Of a replica. Moves are counted with the first, the router's default."""
    fleets: int = 5
    """Of each size; their replicas have other ids."""
    lookups: int = 10_000
    """By the router itself, timed."""
    turns_at_once: int = 16
    """Of a replica, on average."""
    think_s: float = 60
    """From one turn to the next of a session to which somebody speaks."""
    turn_tokens: int = 200
    """That a turn computes, read and generated, where its buffer's blocks are in the pool."""
    pool_tokens: int = 500_000
    """Of a replica's KV pool."""
    block: int = 16
    """Tokens."""
    sinks: int = SinkSettings().sinks
    window: int = SinkSettings().window_tokens
    marks: tuple[int, ...] = (4, 8, 16, MARK)
    """In multiples of S + W."""

    @property
    def pooled(self) -> int:
        """Sessions whose blocks a replica's pool holds: those that the next query sees."""
        most = Geometry(self.sinks, self.window).max_blocks(self.block)
        return self.pool_tokens // self.block // most

    def buffer(self, mark: int) -> Buffer:
        return Buffer(self.sinks, self.window, mark * (self.sinks + self.window))


QUICK = Plan(sessions=20_000, replicas=(1, 10), virtual_nodes=(100,), fleets=2, lookups=100)


@dataclass(frozen=True)
class Sessions:
    ids: list[str]
    hashes: Hashes
    ranks: NDArray[np.int64]
    """By activity: 1 is that which speaks most."""

    @classmethod
    def many(cls, count: int, random: np.random.Generator) -> "Sessions":
        ids = [f"s{n:07}" for n in range(count)]
        # In the order of their hashes they are found several times as fast.
        return cls(ids, np.sort(ring.hashes(ids)), random.permutation(count) + 1)

    def speaking(self, count: int, random: np.random.Generator) -> NDArray[np.intp]:
        """So many that are in a turn, no session in two; by Zipf's law the k-th has a k-th of the
        first one's chances."""
        # The largest of log weights with Gumbel noise are a weighted draw without replacement.
        keys = random.gumbel(size=len(self.ranks)) - np.log(self.ranks)
        return np.argpartition(keys, -count)[-count:]

    def pooled(self, owners: Owners, places: int) -> NDArray[np.bool_]:
        """Which have their blocks in a pool: of each replica's the `places` that speak most."""
        order = np.lexsort((self.ranks, owners))
        sorted_owners = owners[order]
        firsts = np.searchsorted(sorted_owners, sorted_owners)
        pooled = np.empty(len(owners), np.bool_)
        pooled[order] = np.arange(len(owners)) - firsts < places
        return pooled


def fleets(plan: Plan) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    sessions = Sessions.many(plan.sessions, random)
    for replicas in track(plan.replicas, "fleets", console=console, transient=True):
        samples = [fleet(plan, sessions, replicas, random) for _ in range(plan.fleets)]
        yield {"replicas": replicas, **spreads(samples)}


def fleet(
    plan: Plan, sessions: Sessions, replicas: int, random: np.random.Generator
) -> dict[str, Any]:
    """One fleet's balance, and what moves when it gets a replica or loses its last one."""
    ids = [random.bytes(8).hex() for _ in range(replicas + 1)]
    speaking = sessions.speaking(plan.turns_at_once * replicas, random)
    rings = {nodes: Ring(ids[:replicas], nodes) for nodes in plan.virtual_nodes}
    owners = {nodes: rings[nodes].owners(sessions.hashes) for nodes in rings}
    default = plan.virtual_nodes[0]
    pooled = sessions.pooled(owners[default], plan.pooled)

    def change(others: list[str]) -> dict[str, float]:
        after = Ring(others, default).owners(sessions.hashes)
        return moves(owners[default], after, pooled, ideal=1 / max(replicas, len(others)))

    return {
        "balance": {
            str(nodes): {
                "sessions": balance(owners[nodes], replicas),
                "turns": balance(owners[nodes][speaking], replicas),
                "rebuild_ms": 1000 * rings[nodes].rebuild_s,
                "lookup_us": 1e6 * rings[nodes].lookup_s(sessions.ids[: plan.lookups]),
            }
            for nodes in rings
        },
        "pooled_turns": pooled[speaking].mean(),
        "added": change(ids),
        **({"lost": change(ids[: replicas - 1])} if replicas > 1 else {}),
    }


def balance(owners: Owners, replicas: int) -> dict[str, float]:
    """Of what the replicas have, over their mean."""
    counts = np.bincount(owners, minlength=replicas)
    mean = len(owners) / replicas
    return {"max": counts.max() / mean, "p99": np.percentile(counts, 99) / mean}


def moves(
    before: Owners, after: Owners, pooled: NDArray[np.bool_], ideal: float
) -> dict[str, float]:
    """Sessions with another replica than before; `ideal` is the least share that has to move."""
    moved = before != after
    return {
        "share": moved.mean(),
        "over_ideal": moved.mean() / ideal,
        "reread_sessions": (moved & pooled).sum(),
        "readers": len(np.unique(after[moved])),
    }


def spreads(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure over all samples."""
    found: dict[str, Any] = {}
    for name, first in samples[0].items():
        seen = [sample[name] for sample in samples]
        of_parts = isinstance(first, dict)
        found[name] = spreads(seen) if of_parts else results.spread([*map(float, seen)])
    return found


def held(buffer: Buffer) -> float:
    """Tokens far down a stream, on average: from S + W to one below the mark, each as often."""
    return (buffer.kept + buffer.mark - 1) / 2


def row_bytes(text: list[int], buffered: int) -> int:
    return session_of("s0000000", 1, text, buffered).encode().size


def by_marks(plan: Plan, measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a session far down its stream costs to read again and to keep."""
    text = book_tokens(embedded.path())
    idle, seen = measured["setup"]["idle"]["buffer"], measured["idle"]["redis"][-1]
    of_redis = seen["bytes_a_session"] - row_bytes(text, idle["sinks"] + idle["window"])
    for mark in plan.marks:
        tokens = held(plan.buffer(mark))
        row = row_bytes(text, round(tokens))
        yield {
            "mark": mark,
            "held": tokens,
            "turns_a_reread": round(tokens / plan.turn_tokens, 1),
            "pool_reread_tokens": round(plan.pooled * tokens),
            "row_bytes": row,
            "redis_gb": round(plan.sessions * (row + of_redis) / 1e9, 1),
            "written_mb_s": round(plan.sessions / plan.think_s * row / 1e6, 1),
        }


def by_redis(plan: Plan, measured: dict[str, Any]) -> dict[str, Any]:
    """How far one Redis goes, at the rates that were measured."""
    most = max(measured["setup"]["stores"]["tasks"])
    rows = []
    for row in measured["stores"]["rows"]:
        if row["tasks"] == most and row["store"].startswith("redis"):
            speaking = row["turns_s"] * plan.think_s
            rows.append(
                {
                    "store": row["store"],
                    "buffered": row["buffered"],
                    "turns_s": row["turns_s"],
                    "sessions": round(speaking),
                    "replicas": round(speaking / plan.pooled, 1),
                    "stores": math.ceil(plan.sessions / speaking),
                }
            )
    seen = measured["idle"]["redis"][-1]
    usage_ms = seen["usage_ms"]["median"] * plan.sessions / seen["sessions"]
    limited = {"usage_ms": round(usage_ms, 1), "turns_s": round(1000 / usage_ms, 1)}
    return {"turns_s": round(plan.sessions / plan.think_s), "rows": rows, "limited": limited}


def show(figures: dict[str, Any]) -> None:
    table = Table("replicas", "virtual nodes", "sessions: max", "p99", "turns: max", "rebuild, ms")
    for row in figures["fleets"]:
        for nodes, seen in row["balance"].items():
            ratios = (*seen["sessions"].values(), seen["turns"]["max"])
            cells = (f"{ratio['median']:.2f}" for ratio in ratios)
            rebuild = f"{seen['rebuild_ms']['median']:.1f}"
            table.add_row(f"{row['replicas']:,}", nodes, *cells, rebuild)
    console.print(table)
    table = Table("replicas", "", "moved over 1/N", "read again", "by replicas", "turns in pools")
    for row in figures["fleets"]:
        for change in ("added", "lost"):
            if seen := row.get(change):
                cells = (f"{seen[name]['median']:g}" for name in ("reread_sessions", "readers"))
                ratio, pooled = seen["over_ideal"]["median"], row["pooled_turns"]["median"]
                table.add_row(
                    f"{row['replicas']:,}", change, f"{ratio:.2f}", *cells, f"{pooled:.0%}"
                )
    console.print(table)
    table = Table("mark, S + W", "held", "row, bytes", "turns a re-read", "Redis, GB", "MB/s")
    for row in figures["marks"]:
        names = ("mark", "held", "row_bytes", "turns_a_reread", "redis_gb", "written_mb_s")
        table.add_row(*(f"{row[name]:,}" for name in names))
    console.print(table)
    table = Table("store", "held", "turns/s", "is enough for sessions", "for replicas", "for all")
    for row in figures["redis"]["rows"]:
        table.add_row(row["store"], *(f"{value:,}" for value in [*row.values()][1:]))
    console.print(table)


def main() -> None:
    options = cli.parser(__doc__).parse_args()
    ring.serve()
    if not MEASURED.exists():
        raise cli.BenchmarkError(f"No {MEASURED}: run `python -m benchmarks.sessions`.")
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    plan = QUICK if options.quick else Plan()
    figures = {
        "setup": asdict(plan) | {"pooled": plan.pooled, "ray": version("ray")},
        "fleets": [*fleets(plan)],
        "marks": [*by_marks(plan, measured)],
        "redis": by_redis(plan, measured),
    }
    results.write(cli.folder(options) / "scale.json", "benchmarks.scale", figures)
    show(figures)


if __name__ == "__main__":
    cli.run(main)

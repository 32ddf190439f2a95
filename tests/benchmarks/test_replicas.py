from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from benchmarks.harness.fleet import SPREAD, Fleet
from benchmarks.harness.servers import BLOCK, Target
from benchmarks.replicas import PLAN, STREAMS
from benchmarks.turns import routed, sharing, staying
from benchmarks.turns.asking import Answer
from benchmarks.turns.routing import EitherRouter
from tests.launch.test_router import chosen, with_a_ring


class ReplicaByNumber(BaseHTTPRequestHandler):
    """Every third session is with the second replica."""

    def do_GET(self) -> None:
        number = int(self.path.rpartition(".")[2])
        self.send_response(404)
        self.send_header("X-Replica", "b" if number % 3 == 2 else "a")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with HTTPServer(("127.0.0.1", 0), ReplicaByNumber) as server:
        Thread(target=server.serve_forever).start()
        yield Fleet(Target(f"http://127.0.0.1:{server.server_port}", "served"), Path())
        server.shutdown()


@pytest.mark.parametrize(
    ("shares", "numbers"),
    [([2, 2], [0, 1, 2, 5]), ([4, 0], [0, 1, 3, 4]), ([0, 1], [2])],
)
def test_sessions_are_shared_out(fleet: Fleet, shares: list[int], numbers: list[int]) -> None:
    assert fleet.names("s", shares) == [f"s.{number}" for number in numbers]


def test_some_sessions_are_spread_by_load() -> None:
    router = with_a_ring(EitherRouter)
    first, *others = chosen(router, "a", 20)
    assert all(ranks == first for ranks in others)
    assert len({tuple(rank) for (rank,) in chosen(router, f"{SPREAD}a", 200)}) == 20


def test_rounds_begin_where_the_last_one_ended() -> None:
    assert routed.in_turns(["a", "b"], 3) == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_percentiles() -> None:
    assert routed.percentiles([*map(float, range(101))]) == {"p50": 50, "p95": 95}


def test_a_part_of_the_cpu_that_was_not_always_there() -> None:
    assert sharing.rounded([{"a": 1.0}, {"a": 3.0, "b": 0.5}]) == {"a": 2.0, "b": 0.25}


def turns(*first_ms: float, cached: int) -> staying.Turns:
    """Of one session, whose first turn finds nothing."""
    return [[Answer(ms, 10, cached if number else None, "")] for number, ms in enumerate(first_ms)]


def test_arms_are_compared_without_first_turns() -> None:
    stay = [turns(90, 1, 3, cached=8), turns(90, 2, 2, cached=8)]
    spread = [turns(10, 4, 4, cached=2), turns(10, 8, 8, cached=2)]
    found = staying.compared({"stay": stay, "spread": spread})
    assert found["spread_over_stay"] == {"min": 2.0, "median": 3.0, "max": 4.0}
    assert found["arms"]["stay"]["hit_rate"] == 0.8
    assert found["arms"]["stay"]["by_turn"]["hit_rate"] == [0.0, 0.8, 0.8]
    assert found["arms"]["spread"]["by_turn"]["first_ms"] == [10, 6, 6]


def test_the_plan_fits_its_servers() -> None:
    """Pools have room for all of the fewer sessions and for half of the more, and no turn waits."""
    plan = PLAN.affinity
    assert sum(plan.questions) + plan.turns * plan.answer < PLAN.buffer.mark
    window, last_turn, ends = PLAN.buffer.kept, plan.question + plan.answer, 2
    blocks = -(-(window + last_turn) // BLOCK) + ends
    fewer, more = plan.sessions
    assert max(fewer, more // 2) * blocks < PLAN.pool_blocks < more * PLAN.buffer.kept // BLOCK
    assert max(PLAN.throughput.sessions, *PLAN.cost.at_once) <= STREAMS

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import scale
from benchmarks.harness import ring
from benchmarks.harness.cli import COMMITTED
from benchmarks.scale import QUICK, Plan, Sessions
from vllm_sink.buffer import Buffer

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

IDS = [f"s{n}" for n in range(500)]


def sessions(count: int, seed: int = 0) -> Sessions:
    """As many as there are, all with the same hash."""
    ranks = np.random.default_rng(seed).permutation(count) + 1
    return Sessions(IDS[:count], np.zeros(count, np.uint64), ranks)


@with_ray
@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 100))
def test_a_replica_more_takes_from_all_and_one_less_gives_to_all(
    replicas: int, virtual_nodes: int
) -> None:
    ids = [f"r{n}" for n in range(replicas + 1)]
    hashes = ring.hashes(IDS)
    few, many = (ring.Ring(some, virtual_nodes).owners(hashes) for some in (ids[:-1], ids))
    moved = few != many
    assert (many[moved] == replicas).all()
    assert (many == replicas).sum() == moved.sum()
    assert set(few) <= set(range(replicas))


@with_ray
def test_figures_of_a_fleet() -> None:
    plan = replace(QUICK, turns_at_once=30, virtual_nodes=(50, 200))
    random = np.random.default_rng(1)
    seen = scale.fleet(plan, Sessions.many(5_000, random), 6, random)
    assert set(seen["balance"]) == {"50", "200"}
    assert 1 < seen["balance"]["50"]["sessions"]["max"] < 2
    assert 0 < seen["pooled_turns"] < 1
    assert seen["added"]["readers"] == 1
    assert 0 < seen["added"]["share"] < 0.5
    assert seen["lost"]["readers"] == 5
    # All that were in the pool of the one that is lost.
    assert seen["lost"]["reread_sessions"] == plan.pooled


def test_what_the_fullest_has() -> None:
    owners = np.array([0, 0, 0, 2, 2, 1])
    assert scale.balance(owners, 3)["max"] == 1.5
    # A replica without any counts in the mean.
    assert scale.balance(owners, 4)["max"] == 2.0
    spread = np.repeat(np.arange(100), [*[1] * 99, 101])
    assert scale.balance(spread, 100)["max"] == 50.5
    assert scale.balance(spread, 100)["p99"] == pytest.approx(1.0)


def test_what_moves_is_read_again_where_it_was_pooled() -> None:
    before, after = np.array([0, 0, 1, 1]), np.array([0, 2, 2, 1])
    pooled = np.array([True, True, False, True])
    assert scale.moves(before, after, pooled, ideal=0.25) == {
        "share": 0.5,
        "over_ideal": 2.0,
        "reread_sessions": 1,
        "readers": 1,
    }


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 10))
def test_pools_have_those_that_speak_most(owners: list[int], places: int) -> None:
    some = sessions(len(owners))
    pooled = some.pooled(np.array(owners), places)
    for owner in set(owners):
        ranks = sorted(some.ranks[np.array(owners) == owner])
        assert sorted(some.ranks[pooled & (np.array(owners) == owner)]) == ranks[:places]


@given(st.integers(1, 500), st.integers(0, 2**32))
def test_no_session_is_in_two_turns(count: int, seed: int) -> None:
    speaking = sessions(500).speaking(count, np.random.default_rng(seed))
    assert len(set(speaking)) == count


def test_who_speaks_is_by_zipfs_law() -> None:
    random, some = np.random.default_rng(0), sessions(3)
    first = [some.ranks[some.speaking(1, random)[0]] for _ in range(11_000)]
    # Chances of 6, 3 and 2 in 11.
    assert np.bincount(first)[1:] == pytest.approx([6_000, 3_000, 2_000], rel=0.1)


@given(st.integers(0, 4), st.integers(1, 8), st.integers(1, 20))
def test_tokens_held_on_average(sinks: int, window: int, above: int) -> None:
    buffer = Buffer(sinks, window, sinks + window + above)
    tokens, lengths = [0] * buffer.kept, []
    for _ in range(above):
        lengths.append(len(tokens))
        tokens = buffer.extended(tokens, [0])
    assert scale.held(buffer) == pytest.approx(np.mean(lengths))


def test_a_pool_has_whole_sessions() -> None:
    # A block with the sinks, and 63 tokens before the last one: in 5 blocks of 16 at worst.
    plan = replace(QUICK, sinks=4, window=64, block=16, pool_tokens=16 * (6 * 7 + 5))
    assert plan.pooled == 7


def test_the_last_mark_is_the_default() -> None:
    plan = Plan()
    assert plan.buffer(plan.marks[-1]) == scale.SinkSettings().buffer(2**17)


def test_how_far_one_redis_goes() -> None:
    def row(store: str, tasks: int) -> dict[str, Any]:
        return {"store": store, "buffered": 64, "tasks": tasks, "turns_s": 50.0}

    measured = {
        "setup": {"stores": {"tasks": [1, 16]}},
        "stores": {"rows": [row("sqlite", 16), row("redis, always", 1), row("redis, always", 16)]},
        "idle": {"redis": [{"sessions": 1_000, "usage_ms": {"median": 2.0}}]},
    }
    plan = replace(QUICK, sessions=10_000, think_s=10)
    found = scale.by_redis(plan, measured)
    assert found["turns_s"] == 1_000
    assert found["limited"] == {"usage_ms": 20.0, "turns_s": 50.0}
    (seen,) = found["rows"]
    assert (seen["sessions"], seen["stores"]) == (500, 20)
    assert seen["replicas"] == round(500 / plan.pooled, 1)


def test_spreads_are_of_each_figure() -> None:
    samples = [{"a": {"b": value}, "c": 10 * value} for value in (3, 1, 2)]
    assert scale.spreads(samples) == {
        "a": {"b": {"min": 1.0, "median": 2.0, "max": 3.0}},
        "c": {"min": 10.0, "median": 20.0, "max": 30.0},
    }


def test_committed_figures_are_of_the_committed_rates() -> None:
    written, measured = (
        json.loads((COMMITTED / f"{name}.json").read_text("utf-8"))
        for name in ("scale", "sessions")
    )
    assert written["redis"] == scale.by_redis(Plan(), measured), "run `python -m benchmarks.scale`"


@with_ray
@pytest.mark.slow
def test_quick(quick: Callable[[str], Any]) -> None:
    written = quick("scale")
    one, ten = written["fleets"]
    assert one["balance"]["100"]["sessions"]["max"] == {"min": 1, "median": 1, "max": 1}
    assert "lost" not in one
    assert ten["balance"]["100"]["sessions"]["max"]["min"] > 1
    assert 0.5 < ten["added"]["over_ideal"]["median"] < 2
    held = [row["held"] for row in written["marks"]]
    rows = [row["row_bytes"] for row in written["marks"]]
    assert held == sorted(held)
    # Token ids that are compressed, and not much beside them.
    assert all(1 < row / tokens < 4 for row, tokens in zip(rows, held, strict=True))

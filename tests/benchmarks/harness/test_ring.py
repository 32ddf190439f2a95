import sys
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import ring
from benchmarks.harness.cli import BenchmarkError

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@with_ray
@given(
    st.lists(st.text("0123456789abcdef", min_size=1), min_size=1, max_size=5, unique=True),
    st.integers(1, 20),
    st.lists(st.text(), min_size=1, max_size=50),
)
def test_owners_are_those_that_the_router_finds(
    replicas: list[str], virtual_nodes: int, sessions: list[str]
) -> None:
    made = ring.Ring(replicas, virtual_nodes)
    found = [replicas[owner] for owner in made.owners(ring.hashes(sessions))]
    ranked = [made.router._lookup_ranked_replicas(session) for session in sessions]
    assert found == [first.unique_id for first, *_ in ranked]
    assert len(made.router._ring_hashes) == virtual_nodes * len(replicas)


@with_ray
def test_calls_are_timed() -> None:
    made = ring.Ring([f"r{n}" for n in range(20)], 100)
    assert made.rebuild_s > 0
    assert made.lookup_s(["ada"] * 1000) > 0


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve.experimental", None)
    monkeypatch.delitem(sys.modules, "ray.serve.experimental.consistent_hash_router", raising=False)
    with pytest.raises(BenchmarkError, match=r"`pip install vllm-sink\[ray\]`"):
        ring.hashes(["ada"])

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest

from launch.router import SessionRouter

DEPLOYMENT = DeploymentID(name="d", app_name="a")
REPLICAS = [ReplicaID(f"r{i}", DEPLOYMENT) for i in range(5)]


@pytest.fixture
def router() -> SessionRouter:
    return with_a_ring(SessionRouter)


def with_a_ring(router_class: type[SessionRouter]) -> SessionRouter:
    """And no loop that would route."""
    router: Any = router_class.__new__(router_class)
    router._num_virtual_nodes, router._num_fallback_replicas = 100, 2
    router._deployment_id = DEPLOYMENT
    router._replicas = {id: SimpleNamespace(replica_id=id) for id in REPLICAS}
    router._rebuild_ring(frozenset(REPLICAS))
    return router


def chosen(router: Any, session: str, count: int = 1) -> list[list[list[str]]]:
    async def choose() -> list[Any]:
        made = []
        for i in range(count):
            metadata = RequestMetadata(f"q{i}", f"i{i}", session_id=session)
            ranks = await router.choose_replicas(
                [*router._replicas.values()], PendingRequest([], {}, metadata)
            )
            made.append([[each.replica_id.unique_id for each in rank] for rank in ranks])
        return made

    return asyncio.run(choose())


def test_a_session_stays_with_its_replica(router: SessionRouter) -> None:
    first, *others = chosen(router, "a", 20)
    assert all(ranks == first for ranks in others)
    assert [len(rank) for rank in first] == [1, 1, 1]


def test_sessions_are_spread(router: SessionRouter) -> None:
    counts = Counter(chosen(router, f"s{i}")[0][0][0] for i in range(500))
    assert set(counts) == {id.unique_id for id in REPLICAS}


def test_what_has_no_session_goes_to_the_less_loaded_of_two(router: SessionRouter) -> None:
    ranks = chosen(router, "", 200)
    assert all(len(rank) == 2 == len(set(rank)) for (rank,) in ranks)
    assert len({tuple(rank) for (rank,) in ranks}) == 20

"""Ray Serve's consistent-hash router, asked for the replicas of many sessions at once."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.cli import BenchmarkError

Hashes = NDArray[np.uint64]
Owners = NDArray[np.intp]
"""The replica of each session, by its number."""


def serve() -> Any:
    """The module of Serve's router, which logs no rings from here on.

    Raises:
        BenchmarkError: Ray Serve is not installed.
    """
    try:
        from ray.serve.experimental import consistent_hash_router
    except ImportError as error:
        raise BenchmarkError(
            "Ray Serve's router is not there: run `pip install vllm-sink[ray]`."
        ) from error
    consistent_hash_router.logger.setLevel("WARNING")
    return consistent_hash_router


def hashes(sessions: Iterable[str]) -> Hashes:
    """Of session ids, as the router hashes them."""
    hash_bytes = serve()._hash_bytes
    return np.array([hash_bytes(id.encode()) for id in sessions], np.uint64)


class Ring:
    """A router without a Serve around it, which knows of replicas by their unique ids."""

    def __init__(self, replicas: Sequence[str], virtual_nodes: int) -> None:
        router_class = serve().ConsistentHashRouter
        from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

        deployment = DeploymentID("sessions")
        self.router = router_class(
            deployment_id=deployment, handle_source=DeploymentHandleSource.UNKNOWN
        )
        self.router.initialize_state(num_virtual_nodes=virtual_nodes)
        ids = frozenset(ReplicaID(replica, deployment) for replica in replicas)
        start = time.process_time()
        self.router._rebuild_ring(ids)
        self.rebuild_s = time.process_time() - start
        """Of CPU time."""
        numbers = {replica: number for number, replica in enumerate(replicas)}
        self._hashes = np.array(self.router._ring_hashes, np.uint64)
        self._owners = np.array([numbers[id.unique_id] for id in self.router._ring_replicas])

    def owners(self, hashes: Hashes) -> Owners:
        """The first of the router's ranked replicas for each session."""
        places = np.searchsorted(self._hashes, hashes, side="right")
        return self._owners[places % len(self._hashes)]

    def lookup_s(self, sessions: Sequence[str]) -> float:
        """Seconds of CPU time that the router itself takes for one of them, on average."""
        start = time.process_time()
        for session in sessions:
            self.router._lookup_ranked_replicas(session)
        return (time.process_time() - start) / len(sessions)

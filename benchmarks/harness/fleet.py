"""Replicas on a Ray of their own, by `python -m launch.local`, and what CPU time they take."""

import asyncio
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.harness import servers
from benchmarks.harness.cli import BenchmarkError
from benchmarks.harness.servers import Target
from launch import group
from launch.server import Server, ServerLostError, free_port

MODEL = "served"
APPLICATION = {
    "name": "vllm_sink",
    "route_prefix": "/",
    "import_path": "benchmarks.turns.routing:build",
}
SPREAD = "spread."
"""Begins the names of sessions whose turns go wherever there is less to do, as those of none do."""
STOP_SECONDS = 30
"""That Ray gets to end its processes."""
SCALE_SECONDS = 300
PROBES = 30
"""Sessions that are asked for: that none of them is with one of two replicas is no chance."""
PARTS = {
    "engines": "VLLM::",
    "replicas": "ray::ServeReplica:vllm_sink:Server",
    "ingress": "ray::ServeReplica:vllm_sink:Ingress",
    "proxy": "ray::ProxyActor",
}
"""How processes' titles begin."""


@dataclass(frozen=True)
class Fleet:
    target: Target
    config: Path

    def scale(self, replicas: int) -> None:
        """Raises:
        BenchmarkError: they do not come.
        """
        config = yaml.safe_load(self.config.read_text("utf-8"))
        deployment = {"name": f"Server:{MODEL}", "num_replicas": replicas}
        config["applications"][0]["deployments"] = [deployment]
        self.config.write_text(yaml.safe_dump(config), encoding="utf-8")
        assert self.target.process is not None
        self.target.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + SCALE_SECONDS
        with httpx.Client() as http:
            while len({self._replica_of(http, f"probe{i}") for i in range(PROBES)}) != replicas:
                if time.monotonic() > end:
                    raise BenchmarkError(f"{replicas} replicas did not come.")
                time.sleep(1)

    def names(self, prefix: str, shares: list[int]) -> list[str]:
        """Of sessions: so many that are with one replica, so many that are with the next one."""
        found: dict[str, list[str]] = defaultdict(list)
        with httpx.Client() as http:
            for number in count():
                name = f"{prefix}.{number}"
                found[self._replica_of(http, name)].append(name)
                there = [found[replica] for replica in sorted(found)]
                if len(there) == len(shares) and all(
                    len(names) >= share for names, share in zip(there, shares, strict=True)
                ):
                    break
        return [name for names, share in zip(there, shares, strict=True) for name in names[:share]]

    def _replica_of(self, http: httpx.Client, session: str) -> str:
        """Where a session is, be there one of that name or not."""
        answer = http.get(f"{self.target.url}/v1/sessions/{session}", timeout=60)
        return str(answer.headers["x-replica"])


@contextmanager
def running(streams: int, flags: dict[str, Any]) -> Iterator[Fleet]:
    """One replica at first.

    Raises:
    BenchmarkError: it does not start.
    """
    args = {
        "flags": flags | {"served-model-name": MODEL, "enforce-eager": True},
        "streams": streams,
        "cpus": 0.1,
        "worker": {"CPU": 0.1},
        "env": servers.ENVIRONMENT,
    }
    port = free_port()
    with TemporaryDirectory() as scratch:
        config, log = Path(scratch, "serve.yaml"), Path(scratch, "log")
        config.write_text(
            yaml.safe_dump({"applications": [APPLICATION | {"args": args}]}), encoding="utf-8"
        )
        command = [sys.executable, "-m", "launch.local", str(config), f"--port={port}"]
        with group.logged(log, command, os.environ, STOP_SECONDS) as started:
            server = Server(started, f"http://127.0.0.1:{port}")
            try:
                asyncio.run(server.ready())
            except ServerLostError as error:
                told = servers.cause(log.read_text("utf-8", errors="replace"))
                raise BenchmarkError(f"The replicas did not start: {told}") from error
            process = psutil.Process(started.leader.pid)
            yield Fleet(Target(server.url, MODEL, process), config)


@contextmanager
def cores_taken(target: Target) -> Iterator[dict[str, float]]:
    """Meanwhile, by whom; filled in at the end."""
    cores: dict[str, float] = {}
    before, start = cpu_seconds(target), time.perf_counter()
    yield cores
    seconds = time.perf_counter() - start
    cores |= {part: taken / seconds for part, taken in (cpu_seconds(target) - before).items()}


def cpu_seconds(target: Target) -> Counter[str]:
    """Of a server with all that it started, by PARTS, and of its clients: this process."""
    assert target.process is not None
    own = psutil.Process().cpu_times()
    taken = Counter({"clients": own.user + own.system})
    for each in [target.process, *target.process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            title, times = " ".join(each.cmdline()), each.cpu_times()
            part = next((name for name, begin in PARTS.items() if title.startswith(begin)), "rest")
            taken[part] += times.user + times.system
    return taken

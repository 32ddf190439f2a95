"""Both stores, each in a place of its own."""

import asyncio
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pytest
import redis

from benchmarks.harness import redis as harness
from launch.server import free_port
from vllm_sink.sessions.store import Store
from vllm_sink.sessions.stores import opened

Run = Callable[[Any], Any]


class RedisServer:
    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.arguments = folder, arguments
        self.port = free_port()
        self.address = f"redis://127.0.0.1:{self.port}"
        self.client = redis.Redis(port=self.port)
        self.start()

    def start(self) -> None:
        self.process: subprocess.Popen[bytes] = harness.start(
            self.folder, self.port, *self.arguments
        )
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with suppress(redis.ConnectionError):
                self.client.ping()
                return
            time.sleep(0.02)
        pytest.fail((self.folder / "redis.log").read_text())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)


class Clock:
    """Time that passes when a test says so; seconds."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Place(Protocol):
    """Where a store keeps sessions, for what a store would not do."""

    address: str

    def field(self, name: str) -> Any:
        """Of the session "a" without an owner."""

    def change(self, **fields: Any) -> None: ...


class SqlitePlace:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = f"sqlite:{path}"

    def field(self, name: str) -> Any:
        with sqlite3.connect(self.path) as connection:
            return connection.execute(f"SELECT {name} FROM sessions WHERE id = 'a'").fetchone()[0]

    def change(self, **fields: Any) -> None:
        with sqlite3.connect(self.path) as connection:
            for name, value in fields.items():
                connection.execute(f"UPDATE sessions SET {name} = ? WHERE id = 'a'", (value,))


class RedisPlace:
    key = "vllm_sink:{owner:}:session:a"

    def __init__(self, server: RedisServer) -> None:
        self.client = server.client
        self.address = server.address

    def field(self, name: str) -> Any:
        return self.client.hget(self.key, name)

    def change(self, **fields: Any) -> None:
        self.client.hset(self.key, mapping=fields)


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    harness.fetch()
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def redis_server(redis_process: RedisServer) -> RedisServer:
    redis_process.client.flushall()
    return redis_process


@pytest.fixture
def run() -> Iterator[Run]:
    """Runs a coroutine; all of a test's in one loop, as those of a server."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        return SqlitePlace(tmp_path / "sessions.db")
    return RedisPlace(request.getfixturevalue("redis_server"))


@pytest.fixture
def store(place: Place, run: Run) -> Iterator[Store]:
    store = opened(place.address, None)
    yield store
    run(store.close())


@pytest.fixture
def expiring(place: Place, run: Run, clock: Clock) -> Iterator[Store]:
    """Keeps sessions for a minute of `clock`'s."""
    store: Any = opened(place.address, 60.0)
    store._clock = clock
    yield store
    run(store.close())

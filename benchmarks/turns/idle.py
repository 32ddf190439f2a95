"""What sessions cost while nothing is said: memory of a server, bytes of a store, time of calls."""

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
from redis import Redis
from rich.console import Console

from benchmarks.harness import redis, results, tiny
from benchmarks.harness.servers import Target
from benchmarks.texts.tokens import book_tokens
from benchmarks.turns import asking
from benchmarks.turns.asking import ask
from benchmarks.turns.commits import session_of
from vllm_sink import embedded
from vllm_sink.buffer import Buffer
from vllm_sink.sessions.session import Session
from vllm_sink.sessions.sqlite import SCHEMA
from vllm_sink.sessions.store import Store
from vllm_sink.sessions.stores import opened

MODEL = {"num_hidden_layers": 1, "vocab_size": 49_152, "max_position_embeddings": 1024}
"""Tiny, with the vocabulary of the text."""
AT_ONCE = 32
"""Sessions on their way to Redis."""
QUESTION = [1] * 50
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    buffer: Buffer
    sessions: tuple[int, ...]
    """That are idle; with 0 the server has those alone that take turns."""
    calls: int
    """Turns and other calls that are timed."""

    def rows(self, count: int, text: list[int]) -> Iterator[Session]:
        return (session_of(f"s{n:07}", n, text, self.buffer.kept) for n in range(count))


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    text = book_tokens(embedded.path())
    found: dict[str, Any] = {"sqlite": [], "redis": []}
    with tiny.llama(speaks=True, **MODEL) as model:
        for count in plan.sessions:
            with TemporaryDirectory() as folder, console.status(f"{count:,} sessions in SQLite"):
                seen = in_sqlite(plan, count, text, model, Path(folder, "sessions.sqlite"))
                found["sqlite"].append({"sessions": count, **seen})
    for count in filter(None, plan.sessions):
        with TemporaryDirectory() as folder, console.status(f"{count:,} sessions in Redis"):
            seen = in_redis(plan, count, text, Path(folder))
            found["redis"].append({"sessions": count, **seen})
    return found


def in_sqlite(plan: Plan, count: int, text: list[int], model: str, path: Path) -> dict[str, Any]:
    """Of a server started with so many sessions in its file."""
    fill(path, plan.rows(count, text))
    size = path.stat().st_size
    address = f"sqlite:{path}"
    settings = {"session-store": address, "kv-cache-memory-bytes": 2**26}
    with asking.server(model, plan.buffer, **settings) as target:
        seen = served(plan, count, target)
    return {"file_mb": megabytes(size), **seen, **asyncio.run(asked(plan, address))}


def fill(path: Path, sessions: Iterator[Session]) -> None:
    """As the store would, one by one and each on disk, in a hundred times the time."""
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA)
        for session in sessions:
            row = session.encode()
            head = session.owner, session.id, session.turn, session.birth, session.used
            connection.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*head, row.size, row.checksum, row.head, row.body),
            )
    connection.close()


def served(plan: Plan, count: int, target: Target) -> dict[str, Any]:
    """First tokens of idle sessions, or of new ones where there are none, lists, and memory."""
    names = [f"s{n * count // plan.calls:07}" for n in range(plan.calls)]
    names = names if count else [f"new{n}" for n in range(plan.calls)]
    fixed = {"model": target.model, "prompt": QUESTION, "max_tokens": 2, "ignore_eos": True}
    with asking.client(target) as client:
        first = [ask(client, "completions", session_id=id, **fixed).first_ms for id in names]
        lists = [timed(partial(list_after, client, id)) for id in names]
    assert target.process is not None
    return {
        "front_end_mib": private([target.process]),
        "engine_mib": private(target.process.children(recursive=True)),
        "turn_first_ms": results.spread(first, 2),
        "get_sessions_ms": results.spread(lists, 2),
    }


def list_after(client: httpx.Client, id: str) -> None:
    client.get("sessions", params={"after": id}).raise_for_status()


def timed(call: Callable[[], None]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def private(processes: list[psutil.Process]) -> float:
    """MiB of pages that no other process has (USS): who else shares the others comes and goes."""
    return round(sum(process.memory_full_info().uss for process in processes) / MIB, 1)


def in_redis(plan: Plan, count: int, text: list[int], folder: Path) -> dict[str, Any]:
    with redis.running(folder, "--appendfsync", "everysec") as address:
        client = Redis.from_url(address)
        empty = client.info("memory")["used_memory"]
        asyncio.run(put(address, plan.rows(count, text)))
        memory = client.info("memory")
        client.close()
        seen = asyncio.run(asked(plan, address))
        size = sum(file.stat().st_size for file in folder.rglob("*.aof"))
    return {
        "file_mb": megabytes(size),
        "memory_mib": round(memory["used_memory"] / MIB, 1),
        "bytes_a_session": round((memory["used_memory"] - empty) / count),
        **seen,
    }


async def put(address: str, sessions: Iterator[Session]) -> None:
    store = opened(address, None)

    async def put() -> None:
        for session in sessions:
            await store.put(session, None)

    await asyncio.gather(*(put() for _ in range(AT_ONCE)))
    await store.close()


async def asked(plan: Plan, address: str) -> dict[str, Any]:
    """How long a store takes to say what an owner has in it, as before each turn under a limit."""
    store: Store = opened(address, None)
    times = [await waited(store.usage("")) for _ in range(plan.calls)]
    await store.close()
    return {"usage_ms": results.spread(times, 2)}


async def waited(answer: Awaitable[object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    await answer
    return 1000 * (time.perf_counter() - start)


def megabytes(size: int) -> float:
    return round(size / 1e6, 1)

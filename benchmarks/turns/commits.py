"""How fast stores take turns, from many conversations at once: each is read, then written back."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from benchmarks.harness import redis
from benchmarks.texts.tokens import book_tokens
from vllm_sink import embedded
from vllm_sink.sessions.session import Session
from vllm_sink.sessions.store import Store
from vllm_sink.sessions.stores import opened

STRIDE = 200
"""Tokens that a turn adds."""
SYNCED_BYTES = 4096
WRITES = 200


@dataclass(frozen=True)
class Plan:
    buffered: tuple[int, ...]
    """Tokens of a session's buffer."""
    tasks: tuple[int, ...]
    """Sessions that take turns at once."""
    seconds: float


@contextmanager
def sqlite() -> Iterator[str]:
    with TemporaryDirectory() as folder:
        yield f"sqlite:{folder}/sessions.sqlite"


@contextmanager
def redis_that_syncs(when: str) -> Iterator[str]:
    with (
        TemporaryDirectory() as folder,
        redis.running(Path(folder), "--appendfsync", when) as address,
    ):
        yield address


STORES: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "sqlite": sqlite,
    "redis, always": lambda: redis_that_syncs("always"),
    "redis, everysec": lambda: redis_that_syncs("everysec"),
}
"""Addresses; Redis's by its `appendfsync`."""


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    text = book_tokens(embedded.path())
    rows = []
    for name, serve in STORES.items():
        for buffered in plan.buffered:
            for tasks in plan.tasks:
                told = f"{name}: {tasks} at once, {buffered:,} tokens each"
                with serve() as address, console.status(told):
                    seen = asyncio.run(take_turns(address, text, buffered, tasks, plan.seconds))
                rows.append({"store": name, "buffered": buffered, "tasks": tasks, **seen})
    return {"sync_ms": percentiles(sync_times()), "rows": rows}


async def take_turns(
    address: str, text: list[int], buffered: int, tasks: int, seconds: float
) -> dict[str, Any]:
    store = opened(address, None)
    commits: list[float] = []
    start = time.monotonic()
    end = start + seconds
    async with asyncio.TaskGroup() as group:
        for task in range(tasks):
            group.create_task(converse(store, text, buffered, f"s{task}", end, commits))
    taken = time.monotonic() - start
    await store.close()
    return {"turns_s": round(len(commits) / taken, 1), "commit_ms": percentiles(commits)}


async def converse(
    store: Store, text: list[int], buffered: int, id: str, end: float, commits: list[float]
) -> None:
    """Take turns until `end`; the seconds that each took to store go to `commits`."""
    while time.monotonic() < end:
        before = await store.get("", id)
        turn = before.turn + 1 if before else 1
        session = session_of(id, turn, text, buffered)
        if before:
            session = session.model_copy(update={"birth": before.birth})
        start = time.perf_counter()
        await store.put(session, before)
        commits.append(time.perf_counter() - start)


def session_of(id: str, turn: int, text: list[int], buffered: int) -> Session:
    """One with a buffer of a book's text, wherever a session with this `turn` reads it."""
    place = STRIDE * turn % (len(text) - buffered)
    return Session(
        id=id,
        owner="",
        turn=turn,
        position=STRIDE * turn + buffered,
        buffered=buffered,
        model="served",
        api="completion",
        created=0,
        used=float(turn),
        tokens=text[place : place + buffered],
    )


def sync_times() -> list[float]:
    """Seconds to write some bytes behind a file and to have them on its disk: what no store that
    is asked once can do without."""
    times = []
    with TemporaryDirectory() as folder, Path(folder, "file").open("ab", buffering=0) as file:
        for _ in range(WRITES):
            start = time.perf_counter()
            file.write(os.urandom(SYNCED_BYTES))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - start)
    return times


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {f"p{p}": round(1000 * ordered[round(last * p / 100)], 3) for p in (50, 99)}

"""Sessions to store, and what other processes do to a store."""

import asyncio
import random
import resource
import sqlite3
import time
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from vllm_sink.sessions.errors import ConflictError, StoreError
from vllm_sink.sessions.session import Session
from vllm_sink.sessions.stores import opened

TOKENS = [random.Random(0).randrange(128_256) for _ in range(500)]


def session(**fields: Any) -> Session:
    defaults: dict[str, Any] = {
        "id": "a",
        "owner": "",
        "turn": 1,
        "position": len(TOKENS),
        "buffered": len(TOKENS),
        "model": "m",
        "api": "chat",
        "created": 1000.0,
        "used": 1000.0,
        "tokens": TOKENS,
    }
    return Session(**defaults | fields)


def later(before: Session, **fields: Any) -> Session:
    """The session after another turn."""
    tokens = [before.turn, *before.tokens[1:]]
    return before.model_copy(update={"turn": before.turn + 1, "tokens": tokens} | fields)


def commit(address: str, turns: int, together: Barrier) -> None:
    """Commit so many turns of the session "a", the first when all of `together` have read it."""

    async def commits() -> None:
        store, committed = opened(address, None), 0
        before = await store.get("", "a")
        together.wait()
        while committed < turns:
            assert before
            with suppress(ConflictError):
                await store.put(later(before, used=time.time()), before)
                committed += 1
            before = await store.get("", "a")
        await store.close()

    asyncio.run(commits())


def fill(path: Path, limit: int) -> tuple[str, int]:
    """Put sessions until the file would have more than `limit` bytes, and one more without limit.

    Returns what the store said, and how many sessions it has in the end.
    """

    async def filled() -> tuple[str, int]:
        store, said, put = opened(f"sqlite:{path}", None), "", 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        while not said:
            try:
                await store.put(session(id=str(put)), None)
                put += 1
            except StoreError as error:
                said = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        await store.put(session(id=str(put)), None)
        usage = await store.usage("")
        await store.close()
        assert usage.sessions == put + 1
        return said, usage.sessions

    return asyncio.run(filled())


def hold(path: Path, statements: list[str]) -> sqlite3.Connection:
    """A connection of somebody else's, in the midst of a transaction."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    for statement in statements:
        connection.execute(statement).fetchall()
    return connection

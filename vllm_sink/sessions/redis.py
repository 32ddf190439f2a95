"""Sessions in Redis, which servers on several machines may share."""

import asyncio
import builtins
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)

from vllm_sink.sessions.errors import StoreError
from vllm_sink.sessions.session import Head, Row, Session, decode_head
from vllm_sink.sessions.store import Usage, conflict

PATIENCE = 5.0
"""Seconds that a call may take."""

SWEEP = """
-- Of an owner: a hash for each session, and of all of them ids, times of last use, and sizes.
local owner, oldest, id = KEYS[1], ARGV[1], ARGV[2]
local ids, used, sizes = owner .. ':ids', owner .. ':used', owner .. ':sizes'
local function key(id) return owner .. ':session:' .. id end
local function forget(id)
    redis.call('ZREM', ids, id)
    redis.call('ZREM', used, id)
    redis.call('HDEL', sizes, id)
    return redis.call('DEL', key(id))
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', used, '-inf', '(' .. oldest)) do forget(id) end
"""
"""How each script begins: with what expired."""

PUT = (
    SWEEP
    + """
local turn, birth, last_use, size, checksum, head, body, ttl, turn_before, birth_before =
    unpack(ARGV, 3)
local there = redis.call('HMGET', key(id), 'turn', 'birth', 'head', 'body')
if there[3] == head and there[4] == body then return false end
if (there[1] or '') ~= turn_before or (there[2] or '') ~= birth_before then
    return there[2] or ''
end
redis.call('HSET', key(id), 'turn', turn, 'birth', birth, 'used', last_use,
    'checksum', checksum, 'head', head, 'body', body)
redis.call('ZADD', ids, 0, id)
redis.call('ZADD', used, last_use, id)
redis.call('HSET', sizes, id, size)
for _, name in ipairs({key(id), ids, used, sizes}) do
    if ttl == '' then redis.call('PERSIST', name) else redis.call('PEXPIRE', name, ttl) end
end
return false
"""
)
"""Returns the birth of what is there where it is not what was there before; empty: nothing is."""

DELETE = SWEEP + "return forget(id)"

LIST = (
    SWEEP
    + """
local limit = ARGV[3]
local heads, gone
repeat
    heads, gone = {}, false
    for _, id in ipairs(redis.call('ZRANGEBYLEX', ids, '(' .. id, '+', 'LIMIT', 0, limit)) do
        local head = redis.call('HGET', key(id), 'head')
        if head then
            table.insert(heads, {id, head})
        else -- by Redis's own clock it expired already
            forget(id)
            gone = true
        end
    end
until not gone
return heads
"""
)

USAGE = (
    SWEEP
    + """
local bytes = 0
for _, size in ipairs(redis.call('HVALS', sizes)) do bytes = bytes + size end
return {redis.call('ZCARD', ids), bytes}
"""
)

CAUSES: dict[type[Exception] | tuple[type[Exception], ...], str] = {
    (TimeoutError, builtins.TimeoutError): f"does not answer within {PATIENCE:g} seconds",
    BusyLoadingError: "is starting: it loads its data",
    (AuthenticationError, NoPermissionError): "does not accept the credentials of its address",
    ConnectionError: "cannot be reached",
    ReadOnlyError: "is a replica, which takes no writes",
    OutOfMemoryError: "has no memory left",
    Exception: "refuses what it is asked for",
}
"""The first that is of an error's kind."""


class RedisStore:
    """A `Store` in Redis 6 or later, or in what speaks its protocol.

    A turn is as durable as Redis is set up to write: `appendonly yes`, `appendfsync always`. What
    is deleted is gone from its memory; its file has it until Redis rewrites that. A session
    expires by the `ttl` of the server that committed its last turn, and of the one that asks.
    """

    def __init__(
        self, url: str, ttl: float | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """`ttl`: seconds since its last use that a session is kept; None: for ever.

        Raises:
            ValueError: `url` is not an address of Redis.
        """
        # Connections that Redis has closed, or that lead to what became a replica, show in use.
        again = Retry(NoBackoff(), 1, (ConnectionError, ReadOnlyError))
        pool = BlockingConnectionPool.from_url(url, timeout=None, retry=again)
        try:
            pool.connection_class(**pool.connection_kwargs)
        except TypeError as error:
            raise ValueError("it has an option that is unknown") from error
        self._redis = Redis.from_pool(pool)
        # The pool would give what is freed to whoever asks then, not to those who wait for it.
        self._free = asyncio.Semaphore(pool.max_connections)
        self._ttl = ttl
        self._clock = clock
        self._put, self._delete, self._list, self._usage = map(
            self._redis.register_script, (PUT, DELETE, LIST, USAGE)
        )

    async def get(self, owner: str, id: str) -> Session | None:
        fields = ["used", "head", "body", "checksum"]
        key = f"{owner_key(owner)}:session:{id}"
        used, head, body, checksum = await self._ask(self._redis.hmget, key, fields)
        if used is None or float(used) < self._oldest():
            return None
        return Session.decode(id, Row(head, body, int(checksum)))

    async def put(self, session: Session, before: Head | None) -> None:
        row, oldest = session.encode(), self._oldest()
        arguments = (
            oldest,
            session.id,
            session.turn,
            session.birth,
            session.used,
            row.size,
            row.checksum,
            row.head,
            row.body,
            "" if self._ttl is None else math.ceil((session.used - oldest) * 1000),
            before.turn if before else "",
            before.birth if before else "",
        )
        birth = await self._ask(self._put, [owner_key(session.owner)], arguments)
        if birth is not None:
            raise conflict(session.id, before, birth.decode() or None)

    async def delete(self, owner: str, id: str) -> bool:
        return bool(await self._ask(self._delete, [owner_key(owner)], (self._oldest(), id)))

    async def list(self, owner: str, after: str, limit: int) -> list[Head]:
        arguments = (self._oldest(), after, limit)
        found = await self._ask(self._list, [owner_key(owner)], arguments)
        return [decode_head(id.decode(), head) for id, head in found]

    async def usage(self, owner: str) -> Usage:
        return Usage(*await self._ask(self._usage, [owner_key(owner)], (self._oldest(),)))

    async def close(self) -> None:
        await self._redis.aclose()

    async def _ask(self, call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(PATIENCE), self._free:
                return await call(*arguments)
        except (RedisError, builtins.TimeoutError) as error:
            (cause, *_) = (CAUSES[kind] for kind in CAUSES if isinstance(error, kind))
            raise StoreError(f"the session store {cause}") from error

    def _oldest(self) -> float:
        """When a session that is still there was used, at the earliest."""
        return -math.inf if self._ttl is None else self._clock() - self._ttl


def owner_key(owner: str) -> str:
    """How the names of an owner's keys begin: by the braces Redis Cluster keeps them together.

    Braces around nothing would not count, and an owner may be empty.
    """
    return f"vllm_sink:{{owner:{owner}}}"

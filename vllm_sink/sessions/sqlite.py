"""Sessions in a file of SQLite, which server processes on one machine may share."""

import asyncio
import math
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from vllm_sink.sessions.errors import StoreError
from vllm_sink.sessions.session import Head, Row, Session, decode_head
from vllm_sink.sessions.store import Usage, conflict

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that a call waits for those before it and for locks of other processes."""
CHECKPOINT_PATIENCE = 100
"""Milliseconds that a call waits until no other process reads what is to be erased."""

SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA secure_delete = ON;
CREATE TABLE IF NOT EXISTS sessions (
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    turn INTEGER NOT NULL,
    birth TEXT NOT NULL,
    used REAL NOT NULL,
    size INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    head BLOB NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (owner, id)
);
CREATE INDEX IF NOT EXISTS sessions_by_use ON sessions (used);
-- All that `usage` asks of a row: the rows themselves are many times as long.
CREATE INDEX IF NOT EXISTS sessions_by_owner ON sessions (owner, used, size);
"""

CAUSES = {
    sqlite3.SQLITE_BUSY: "is locked by another process",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_CORRUPT: "is damaged: SQLite cannot read its file",
    sqlite3.SQLITE_FULL: "has no room left on its disk",
    sqlite3.SQLITE_IOERR: "cannot read or write its disk",
    sqlite3.SQLITE_NOTADB: "is damaged, or no file of SQLite",
    sqlite3.SQLITE_READONLY: "cannot be written to",
}


class SqliteStore:
    """A `Store` in the file `path`, readable by its owner alone.

    What is deleted or expires is overwritten in it. The first call opens the file, made where there
    is none; a later one does again after an error, or where another file has taken its place.
    """

    def __init__(
        self, path: Path, ttl: float | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """`ttl`: seconds since its last use that a session is kept; None: for ever."""
        self._path = path.absolute()
        self._ttl = ttl
        self._clock = clock
        # One: a connection belongs to a thread, and the file takes one writer at a time anyway.
        self._thread = ThreadPoolExecutor(1, "sessions")
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._unerased = True
        """Whether the write-ahead log may hold what was deleted."""

    async def get(self, owner: str, id: str) -> Session | None:
        def get(connection: sqlite3.Connection) -> Session | None:
            found = connection.execute(
                "SELECT head, body, checksum FROM sessions "
                "WHERE owner = ? AND id = ? AND used >= ?",
                (owner, id, self._oldest()),
            ).fetchone()
            return found and Session.decode(id, Row(*found))

        return await self._ask(get)

    async def put(self, session: Session, before: Head | None) -> None:
        def put(connection: sqlite3.Connection) -> None:
            row = session.encode()
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                self._sweep(connection)
                turn, birth, *there = connection.execute(
                    "SELECT turn, birth, head, body FROM sessions WHERE owner = ? AND id = ?",
                    (session.owner, session.id),
                ).fetchone() or (None, None)
                if there == [row.head, row.body]:
                    return
                if (turn, birth) != ((before.turn, before.birth) if before else (None, None)):
                    raise conflict(session.id, before, birth)
                connection.execute(
                    "REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        session.owner,
                        session.id,
                        session.turn,
                        session.birth,
                        session.used,
                        row.size,
                        row.checksum,
                        row.head,
                        row.body,
                    ),
                )
            self._erase(connection)

        await self._ask(put)

    async def delete(self, owner: str, id: str) -> bool:
        def delete(connection: sqlite3.Connection) -> bool:
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                self._sweep(connection)
                deleted = connection.execute(
                    "DELETE FROM sessions WHERE owner = ? AND id = ?", (owner, id)
                ).rowcount
            self._unerased |= deleted > 0
            self._erase(connection)
            return deleted > 0

        return await self._ask(delete)

    async def list(self, owner: str, after: str, limit: int) -> list[Head]:
        def heads(connection: sqlite3.Connection) -> list[Head]:
            found = connection.execute(
                "SELECT id, head FROM sessions WHERE owner = ? AND id > ? AND used >= ? "
                "ORDER BY id LIMIT ?",
                (owner, after, self._oldest(), limit),
            )
            return [decode_head(id, head) for id, head in found]

        return await self._ask(heads)

    async def usage(self, owner: str) -> Usage:
        def usage(connection: sqlite3.Connection) -> Usage:
            found = connection.execute(
                "SELECT count(*), coalesce(sum(size), 0) FROM sessions "
                "WHERE owner = ? AND used >= ?",
                (owner, self._oldest()),
            )
            return Usage(*found.fetchone())

        return await self._ask(usage)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown()

    async def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """What `question` returns, asked in the store's thread."""
        deadline = time.monotonic() + PATIENCE

        def ask() -> T:
            try:
                connection = self._connected(max(0.0, deadline - time.monotonic()))
                return question(connection)
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                raise StoreError(f"the session store {cause(error)}") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, ask)

    def _connected(self, patience: float) -> sqlite3.Connection:
        """The connection, to wait `patience` seconds for locks of others.

        SQLite itself would go on with a file that was moved or deleted, and lose what is written.
        """
        if not self._inode:
            self._path.touch(0o600)
        inode = self._path.stat().st_ino
        if inode != self._inode:
            self._disconnect()
        if not self._connection:
            self._connection = sqlite3.connect(self._path, patience, isolation_level=None)
            self._connection.executescript(SCHEMA)
            self._inode, self._unerased = inode, True
        self._connection.execute(f"PRAGMA busy_timeout = {math.ceil(patience * 1000)}")
        return self._connection

    def _disconnect(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def _oldest(self) -> float:
        """When a session that is still there was used, at the earliest."""
        return -math.inf if self._ttl is None else self._clock() - self._ttl

    def _sweep(self, connection: sqlite3.Connection) -> None:
        swept = connection.execute("DELETE FROM sessions WHERE used < ?", (self._oldest(),))
        self._unerased |= swept.rowcount > 0

    def _erase(self, connection: sqlite3.Connection) -> None:
        """Empty the write-ahead log of what was deleted; if others read it, a later call does."""
        if self._unerased:
            connection.execute(f"PRAGMA busy_timeout = {CHECKPOINT_PATIENCE}")
            (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._unerased = bool(busy)


def cause(error: sqlite3.Error | OSError) -> str:
    """What is wrong with a file that SQLite cannot use."""
    if isinstance(error, OSError):
        return CAUSES[sqlite3.SQLITE_CANTOPEN]
    # The low byte: the rest tells apart cases of the same cause. Errors of Python's have no code.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return CAUSES.get(code, "does not work: its file has another form than this release writes")

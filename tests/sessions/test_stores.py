"""Both stores, by the interface; and what each says when it is out of order."""

import asyncio
import re
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from vllm_sink.sessions import redis as redis_store
from vllm_sink.sessions import sqlite as sqlite_store
from vllm_sink.sessions.errors import ConflictError, SessionError, StoreError, UnreadableError
from vllm_sink.sessions.redis import RedisStore
from vllm_sink.sessions.session import Head, Session
from vllm_sink.sessions.sqlite import SqliteStore
from vllm_sink.sessions.store import Store, Usage
from vllm_sink.sessions.stores import opened

from . import cases
from .cases import later, session
from .conftest import Clock, Place, RedisServer, Run


def head(session: Session) -> Head:
    return Head(**{name: getattr(session, name) for name in Head.model_fields})


def refused(run: Run, call: Any, kind: type[SessionError] = ConflictError) -> str:
    """What a call that fails says."""
    with pytest.raises(kind) as raised:
        run(call)
    return str(raised.value)


def test_what_was_put_is_there_until_it_is_deleted(store: Store, run: Run) -> None:
    first = session()
    assert run(store.get("", "a")) is None
    run(store.put(first, None))
    assert run(store.get("", "a")) == first
    second = later(first, tokens=[7])
    run(store.put(second, head(first)))
    assert run(store.get("", "a")) == second
    assert run(store.delete("", "a"))
    assert run(store.get("", "a")) is None
    assert not run(store.delete("", "a"))


def test_it_is_still_there_for_another_store(store: Store, place: Place, run: Run) -> None:
    run(store.put(session(), None))
    other = opened(place.address, None)
    assert run(other.get("", "a")) is not None
    run(other.close())


def test_conflicts_are_told_apart(store: Store, run: Run) -> None:
    first, other = session(), session()
    second = later(first)
    gone = "session 'a' was deleted meanwhile"
    assert refused(run, store.put(second, first)) == gone
    run(store.put(first, None))
    assert refused(run, store.put(other, None)) == "session 'a' exists already"
    run(store.put(second, first))
    faster = "another turn of session 'a' was committed meanwhile"
    assert refused(run, store.put(later(first, tokens=[1]), first)) == faster
    run(store.delete("", "a"))
    run(store.put(other, None))
    assert refused(run, store.put(second, first)) == f"{gone}, and another took its name"
    assert run(store.get("", "a")) == other


def test_to_put_what_is_there_changes_nothing(store: Store, run: Run) -> None:
    first = session()
    second = later(first)
    for _ in range(2):
        run(store.put(first, None))
    for _ in range(2):
        run(store.put(second, first))
    assert run(store.get("", "a")) == second
    refused(run, store.put(first, None))


def test_owners_are_apart(store: Store, run: Run) -> None:
    mine, theirs = session(owner="me"), session(owner="they", tokens=[1])
    run(store.put(mine, None))
    run(store.put(theirs, None))
    assert run(store.get("me", "a")) == mine
    assert run(store.list("they", "", 9)) == [head(theirs)]
    assert run(store.delete("they", "a"))
    assert run(store.usage("they")) == Usage(0, 0)
    assert run(store.get("me", "a")) == mine


def test_lists_come_in_pages_in_the_order_of_ids(store: Store, run: Run) -> None:
    ids = sorted(["b", "a", "ab", "B", "a-1", "é", "10", "9"])
    for id in reversed(ids):
        run(store.put(session(id=id), None))
    pages: list[list[str]] = []
    after = ""
    while page := run(store.list("", after, 3)):
        pages.append([head.id for head in page])
        after = page[-1].id
    assert pages == [ids[:3], ids[3:6], ids[6:]]


def test_usage_is_that_of_rows(store: Store, run: Run) -> None:
    sessions = [session(), session(id="b", tokens=[])]
    for each in sessions:
        run(store.put(each, None))
    longer = later(sessions[1], tokens=cases.TOKENS)
    run(store.put(longer, sessions[1]))
    expected = sessions[0].encode().size + longer.encode().size
    assert run(store.usage("")) == Usage(2, expected)
    run(store.delete("", "b"))
    assert run(store.usage("")) == Usage(1, sessions[0].encode().size)


def test_what_was_not_used_for_a_while_is_not_there(
    expiring: Store, run: Run, clock: Clock
) -> None:
    first = session()
    run(expiring.put(first, None))
    clock.now += 60
    assert run(expiring.get("", "a")) == first
    clock.now += 1
    assert run(expiring.get("", "a")) is None
    assert run(expiring.list("", "", 9)) == []
    assert run(expiring.usage("")) == Usage(0, 0)
    assert "was deleted" in refused(run, expiring.put(later(first), first))
    assert not run(expiring.delete("", "a"))
    run(expiring.put(session(used=clock.now), None))
    assert run(expiring.usage("")).sessions == 1


def test_a_new_session_takes_the_place_of_one_that_expired(
    expiring: Store, run: Run, clock: Clock
) -> None:
    run(expiring.put(session(), None))
    clock.now += 61
    new = session(used=clock.now)
    run(expiring.put(new, None))
    assert run(expiring.get("", "a")) == new


def test_use_prolongs(expiring: Store, run: Run, clock: Clock) -> None:
    first = session()
    run(expiring.put(first, None))
    clock.now += 50
    second = later(first, used=clock.now)
    run(expiring.put(second, first))
    clock.now += 50
    assert run(expiring.get("", "a")) == second


def test_what_expired_is_swept_away(expiring: Store, place: Place, run: Run, clock: Clock) -> None:
    run(expiring.put(session(), None))
    clock.now += 61
    run(expiring.put(session(id="b", used=clock.now), None))
    forever = opened(place.address, None)
    assert [head.id for head in run(forever.list("", "", 9))] == ["b"]
    run(forever.close())


@pytest.mark.parametrize("field", ["head", "body"])
def test_a_damaged_row_is_refused_and_can_be_deleted(
    field: str, store: Store, place: Place, run: Run
) -> None:
    run(store.put(session(), None))
    row = bytearray(place.field(field))
    row[len(row) // 2] ^= 1
    place.change(**{field: bytes(row)})
    told = "session 'a' is damaged in its store and cannot go on; deleted, its id is free again"
    assert refused(run, store.get("", "a"), UnreadableError) == told
    assert run(store.delete("", "a"))
    run(store.put(session(), None))


def test_a_row_of_another_version_is_refused(store: Store, place: Place, run: Run) -> None:
    run(store.put(session(), None))
    place.change(head=place.field("head").replace(b'"version":1', b'"version":2'))
    told = "session 'a' is stored in version 2 of its format; this release reads version 1"
    assert refused(run, store.get("", "a"), UnreadableError) == told
    assert refused(run, store.list("", "", 9), UnreadableError) == told


def test_of_tasks_that_commit_the_same_turn_one_wins(store: Store, run: Run) -> None:
    first = session()

    async def race() -> list[BaseException | None]:
        await store.put(first, None)
        turns = [later(first, tokens=[number]) for number in range(20)]
        puts = [store.put(turn, first) for turn in turns]
        return await asyncio.gather(*puts, return_exceptions=True)

    outcomes = run(race())
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, ConflictError) for outcome in outcomes) == 19


def test_processes_lose_no_turn_to_each_other(store: Store, place: Place, run: Run) -> None:
    run(store.put(session(), None))
    spawn = get_context("spawn")
    together = spawn.Barrier(2)
    processes = [
        spawn.Process(target=cases.commit, args=(place.address, 50, together)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert run(store.get("", "a")).turn == 101


class Model(RuleBasedStateMachine):
    """A store beside a dict: ids, to sessions that have not expired."""

    ids = st.sampled_from(["a", "b", "c"])

    def __init__(self, store: Store, run: Run, clock: Clock) -> None:
        super().__init__()
        self.store, self.run, self.clock = store, run, clock
        self.kept: dict[str, Session] = {}
        self.before: dict[str, Session] = {}
        for id in "abc":
            run(store.delete("", id))

    def there(self) -> dict[str, Session]:
        oldest = self.clock() - 60
        return {id: session for id, session in self.kept.items() if session.used >= oldest}

    @rule(id=ids, tokens=st.lists(st.integers(0, 2**20), max_size=9))
    def create(self, id: str, tokens: list[int]) -> None:
        new = session(id=id, tokens=tokens, used=self.clock())
        if id in self.there():
            assert "exists" in refused(self.run, self.store.put(new, None))
        else:
            self.run(self.store.put(new, None))
            self.kept[id] = new

    @rule(id=ids)
    def turn(self, id: str) -> None:
        before = self.there().get(id)
        assert self.run(self.store.get("", id)) == before
        if before:
            self.before[id] = before
            self.kept[id] = later(before, used=self.clock())
            self.run(self.store.put(self.kept[id], before))

    @rule(id=ids)
    def late(self, id: str) -> None:
        before = self.before.get(id)
        if before and self.there().get(id) != before:
            refused(self.run, self.store.put(later(before, tokens=[2**32 - 1]), before))

    @rule(id=ids)
    def again(self, id: str) -> None:
        if id in self.there():
            self.run(self.store.put(self.kept[id], self.before.get(id)))

    @rule(id=ids)
    def delete(self, id: str) -> None:
        there = id in self.there()
        assert self.run(self.store.delete("", id)) == there
        self.kept.pop(id, None)

    @rule(seconds=st.sampled_from([1, 30, 61]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @invariant()
    def lists_and_usage_agree(self) -> None:
        there = self.there()
        heads = [head(session) for _, session in sorted(there.items())]
        assert self.run(self.store.list("", "", 9)) == heads
        size = sum(session.encode().size for session in there.values())
        assert self.run(self.store.usage("")) == Usage(len(there), size)


def test_a_store_is_like_a_dict(expiring: Store, run: Run, clock: Clock) -> None:
    run_state_machine_as_test(
        lambda: Model(expiring, run, clock),
        settings=settings(
            max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck)
        ),
    )


# SQLite


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def sqlite(path: Path, run: Run) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    yield store
    run(store.close())


def on_disk(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """By another process."""
    script = (
        "import sqlite3, sys; sqlite3.connect(sys.argv[1], isolation_level=None)"
        ".execute('BEGIN EXCLUSIVE'); print(flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        yield
        process.communicate("\n")


def test_the_file_is_its_owners_alone(sqlite: SqliteStore, path: Path, run: Run) -> None:
    run(sqlite.put(session(), None))
    files = list(path.parent.iterdir())
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_commit_is_on_disk_when_it_returns(sqlite: SqliteStore, run: Run) -> None:
    run(sqlite.put(session(), None))
    pragmas = ["journal_mode", "synchronous", "secure_delete"]

    def settings(connection: sqlite3.Connection) -> list[Any]:
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]

    assert run(sqlite._ask(settings)) == ["wal", 2, 1]


def test_what_is_deleted_is_gone_from_the_disk(sqlite: SqliteStore, path: Path, run: Run) -> None:
    first = session(model="needle")
    second = later(first)
    run(sqlite.put(session(id="b", tokens=[]), None))
    run(sqlite.put(first, None))
    run(sqlite.put(second, first))
    run(sqlite.put(later(second), second))
    bodies = [each.encode().body[:64] for each in (first, second)]
    assert b"needle" in on_disk(path)
    assert all(body in on_disk(path) for body in bodies)
    run(sqlite.delete("", "a"))
    assert b"needle" not in on_disk(path)
    assert not any(body in on_disk(path) for body in bodies)
    assert run(sqlite.get("", "b")) is not None


def test_so_is_what_expires(path: Path, run: Run, clock: Clock) -> None:
    store = SqliteStore(path, 60.0, clock)
    run(store.put(session(model="needle"), None))
    clock.now += 61
    run(store.put(session(id="b", used=clock.now), None))
    assert b"needle" not in on_disk(path)
    run(store.close())


def test_and_what_others_were_reading_goes_with_a_later_commit(
    sqlite: SqliteStore, path: Path, run: Run
) -> None:
    run(sqlite.put(session(model="needle"), None))
    reader = cases.hold(path, ["BEGIN", "SELECT * FROM sessions"])
    assert run(sqlite.delete("", "a"))
    assert b"needle" in on_disk(path)
    reader.close()
    run(sqlite.put(session(id="b"), None))
    assert b"needle" not in on_disk(path)


def test_a_lock_of_another_process(
    sqlite: SqliteStore, path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "PATIENCE", 0.2)
    first = session()
    run(sqlite.put(first, None))
    told = "the session store is locked by another process"
    with locked(path):
        assert refused(run, sqlite.put(later(first), first), StoreError) == told
        assert run(sqlite.get("", "a")) == first
    run(sqlite.put(later(first), first))


def test_many_calls_wait_for_a_lock_together(
    sqlite: SqliteStore, path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "PATIENCE", 0.5)
    run(sqlite.put(session(), None))

    async def calls() -> list[BaseException | None]:
        async with asyncio.timeout(3):
            puts = [sqlite.put(session(id=str(number)), None) for number in range(20)]
            return await asyncio.gather(*puts, return_exceptions=True)

    with locked(path):
        outcomes = run(calls())
    assert all(isinstance(outcome, StoreError) for outcome in outcomes)


def test_a_folder_that_is_not_there(tmp_path: Path, run: Run) -> None:
    store = SqliteStore(tmp_path / "volume" / "sessions.db")
    told = "the session store cannot be opened"
    assert refused(run, store.get("", "a"), StoreError) == told
    (tmp_path / "volume").mkdir()
    run(store.put(session(), None))
    run(store.close())


def test_a_file_that_is_none_of_sqlite(sqlite: SqliteStore, path: Path, run: Run) -> None:
    path.write_bytes(b"something else, and long enough " * 99)
    told = "the session store is damaged, or no file of SQLite"
    assert refused(run, sqlite.get("", "a"), StoreError) == told
    path.unlink()
    run(sqlite.put(session(), None))


def test_a_damaged_file(sqlite: SqliteStore, path: Path, run: Run) -> None:
    for number in range(50):
        run(sqlite.put(session(id=str(number)), None))
    run(sqlite.delete("", "0"))  # all is in the file now, and nothing in its log
    whole = path.read_bytes()
    run(sqlite._ask(lambda connection: None))
    path.write_bytes(whole[:4096] + b"\xa5" * (len(whole) - 4096))
    other = SqliteStore(path)
    told = "the session store is damaged: SQLite cannot read its file"
    assert refused(run, other.list("", "", 9), StoreError) == told
    path.write_bytes(whole)
    assert len(run(other.list("", "", 99))) == 49
    run(other.close())


def test_a_file_that_is_moved_away_and_back(sqlite: SqliteStore, path: Path, run: Run) -> None:
    first = session()
    second = later(first)
    run(sqlite.put(first, None))
    run(sqlite.put(second, first))
    aside = path.with_name("aside.db")
    path.rename(aside)
    told = "the session store cannot be opened"
    assert refused(run, sqlite.get("", "a"), StoreError) == told
    assert refused(run, sqlite.put(later(second), second), StoreError) == told
    aside.rename(path)
    assert run(sqlite.get("", "a")) == second
    run(sqlite.put(later(second), second))
    other = SqliteStore(path)
    assert run(other.get("", "a")).turn == 3
    run(other.close())


def test_a_file_in_the_place_of_another(sqlite: SqliteStore, path: Path, run: Run) -> None:
    run(sqlite.put(session(), None))
    for file in list(path.parent.iterdir()):
        file.unlink()
    path.touch()
    assert run(sqlite.get("", "a")) is None
    run(sqlite.put(session(), None))
    other = SqliteStore(path)
    assert run(other.get("", "a")) is not None
    run(other.close())


def test_a_database_of_something_else(sqlite: SqliteStore, path: Path, run: Run) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE sessions (id TEXT, used REAL)")
    told = "the session store does not work: its file has another form than this release writes"
    assert refused(run, sqlite.get("", "a"), StoreError) == told


def test_no_room(sqlite: SqliteStore, run: Run) -> None:
    run(sqlite.put(session(), None))
    run(sqlite._ask(lambda connection: connection.execute("PRAGMA max_page_count = 1").fetchall()))
    big = session(id="b", tokens=list(range(99_999)))
    told = "the session store has no room left on its disk"
    assert refused(run, sqlite.put(big, None), StoreError) == told
    run(sqlite.put(big, None))  # the limit was that of the connection


def test_a_disk_that_does_not_take_more(path: Path) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as processes:
        said, sessions = processes.submit(cases.fill, path, 200_000).result()
    assert said == "the session store cannot read or write its disk"
    assert sessions > 9


# Redis


@pytest.fixture
def redis(redis_server: RedisServer, run: Run) -> Iterator[RedisStore]:
    store = RedisStore(redis_server.address)
    yield store
    run(store.close())


def test_redis_forgets_by_itself(redis_server: RedisServer, run: Run) -> None:
    store = RedisStore(redis_server.address, 60.0, lambda: 1000.0)
    run(store.put(session(owner="me"), None))
    run(store.put(session(), None))
    keys = redis_server.client.keys()
    assert len(keys) == 8
    assert all(50_000 < redis_server.client.pttl(key) <= 60_000 for key in keys)
    assert {key.split(b"}")[0] for key in keys} == {
        b"vllm_sink:{owner:",
        b"vllm_sink:{owner:me",
    }
    run(store.close())
    forever = RedisStore(redis_server.address)
    first = run(forever.get("", "a"))
    run(forever.put(later(first), first))
    assert redis_server.client.pttl("vllm_sink:{owner:}:session:a") == -1
    run(forever.close())


def test_a_row_that_redis_forgot_is_not_listed(
    redis: RedisStore, redis_server: RedisServer, run: Run
) -> None:
    for id in "abc":
        run(redis.put(session(id=id), None))
    redis_server.client.delete("vllm_sink:{owner:}:session:a")
    assert [head.id for head in run(redis.list("", "", 2))] == ["b", "c"]
    assert run(redis.usage("")).sessions == 2


def test_calls_take_turns_at_a_connection(redis_server: RedisServer, run: Run) -> None:
    store = RedisStore(f"{redis_server.address}?max_connections=1")
    order: list[int] = []

    async def ask(task: int) -> None:
        for _ in range(20):
            await store.usage("")
            order.append(task)

    async def both() -> None:
        await asyncio.gather(ask(0), ask(1))
        await store.close()

    run(both())
    assert 8 <= sum(order[:20]) <= 12, order


def test_scripts_that_redis_forgot(redis: RedisStore, redis_server: RedisServer, run: Run) -> None:
    run(redis.put(session(), None))
    redis_server.client.script_flush()
    assert run(redis.usage("")).sessions == 1


def test_redis_dies_and_comes_back(redis: RedisStore, redis_server: RedisServer, run: Run) -> None:
    first = session()
    run(redis.put(first, None))
    redis_server.kill()
    told = "the session store cannot be reached"
    assert refused(run, redis.get("", "a"), StoreError) == told
    assert refused(run, redis.put(later(first), first), StoreError) == told
    redis_server.start()
    assert run(redis.get("", "a")) == first
    redis_server.kill()
    redis_server.start()
    run(redis.put(later(first), first))  # over a connection that is closed by now


def test_redis_hangs(
    redis: RedisStore,
    redis_server: RedisServer,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_store, "PATIENCE", 0.3)
    first, other = session(), session(id="b")
    second = later(first)
    for each in (first, other):
        run(redis.put(each, None))

    async def calls() -> list[Any]:
        puts = [redis.put(second, first), *(redis.get("", "b") for _ in range(9))]
        return await asyncio.gather(*puts, return_exceptions=True)

    redis_server.pause()
    outcomes = run(calls())
    redis_server.resume()
    assert {str(outcome) for outcome in outcomes} == {
        "the session store does not answer within 5 seconds"
    }
    monkeypatch.undo()
    run(redis.put(second, first))  # whether or not it came about before
    assert run(redis.get("", "a")) == second
    assert run(redis.get("", "b")) == other


@contextmanager
def configured(server: RedisServer, **values: str) -> Iterator[None]:
    names = [name.replace("_", "-") for name in values]
    before = [server.client.config_get(name)[name] for name in names]
    for name, value in zip(names, values.values(), strict=True):
        server.client.config_set(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        server.client.config_set(name, value)


@contextmanager
def replica(server: RedisServer) -> Iterator[None]:
    server.client.replicaof("127.0.0.1", "1")
    yield
    server.client.replicaof("NO", "ONE")


@pytest.mark.parametrize(
    ("out_of_order", "told"),
    [
        (lambda server: configured(server, maxmemory="1"), "has no memory left"),
        (replica, "is a replica, which takes no writes"),
        (
            lambda server: configured(server, min_replicas_to_write="1"),
            "refuses what it is asked for",
        ),
    ],
)
def test_redis_takes_no_writes(
    out_of_order: Callable[[RedisServer], Any],
    told: str,
    redis: RedisStore,
    redis_server: RedisServer,
    run: Run,
) -> None:
    first = session()
    run(redis.put(first, None))
    with out_of_order(redis_server):
        said = refused(run, redis.put(later(first), first), StoreError)
        assert said == f"the session store {told}"
        assert run(redis.get("", "a")) == first
    run(redis.put(later(first), first))


def test_no_password_is_told(redis_server: RedisServer, run: Run) -> None:
    store = RedisStore(redis_server.address.replace("//", "//:secret@"))
    with configured(redis_server, requirepass="other"):
        redis_server.client.auth("other")
        said = refused(run, store.get("", "a"), StoreError)
    assert said == "the session store does not accept the credentials of its address"
    run(store.close())


def test_redis_is_loading(run: Run) -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(9999):
            writer.write(b"-LOADING Redis is loading the dataset in memory\r\n")
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(answers, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            store = RedisStore(f"redis://127.0.0.1:{port}")
            try:
                await store.get("", "a")
            finally:
                await store.close()

    assert refused(run, ask(), StoreError) == "the session store is starting: it loads its data"


# The setting


def test_addresses(tmp_path: Path) -> None:
    assert isinstance(opened(f"sqlite:{tmp_path / 'sessions.db'}", None), SqliteStore)
    for address in ("redis://localhost:1/2", "rediss://:x@localhost", "unix:///run/redis.sock"):
        assert isinstance(opened(address, None), RedisStore)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("", ""),
        ("sessions.db", "sessions.db"),
        ("sqlite:", "sqlite:"),
        ("redis:localhost", "redis:localhost"),
        ("postgres://me:secret@host/db", "postgres:..."),
        ("redis://:secret/@host", "redis:..."),
        ("redis://host?password=secret&nonsense=1", "redis:..."),
        ("redis://host:secret", "redis://host:secret"),
    ],
)
def test_an_address_that_is_none(address: str, shown: str) -> None:
    accepted = "sqlite:PATH, redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix://PATH"
    told = re.escape(f"--session-store is {shown!r}; accepted are {accepted}")
    with pytest.raises(ValueError, match=f"^{told}$"):
        opened(address, None)


def test_redis_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm_sink.sessions.redis")
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ValueError, match=r"needs a package: pip install vllm-sink\[redis\]$"):
        opened("redis://localhost", None)

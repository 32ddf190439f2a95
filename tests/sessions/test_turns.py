"""Turns against both stores, one by one; and whole lives of sessions beside a small model."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from vllm_sink.buffer import Buffer
from vllm_sink.sessions.errors import BusyError, ConflictError, LimitError, SessionError
from vllm_sink.sessions.session import Answer, Session
from vllm_sink.sessions.store import Store
from vllm_sink.sessions.stores import opened
from vllm_sink.sessions.turns import REMEMBERED_REQUESTS, Asked, Limits, Turn, Turns

from .conftest import Clock, Place, Run

BUFFER = Buffer(2, 6, 12)
LONGEST = 20
ASKED = Asked("me", "a", "chat", "m")
TTL = 60.0


def turns(store: Store, buffer: Buffer | None = BUFFER, **limits: int) -> Turns:
    return Turns(store, buffer, LONGEST, Limits(**limits), Clock())


def answer(tokens: list[int]) -> Answer:
    return Answer(
        prompt_tokens=1,
        cached_tokens=0,
        cache_creation_tokens=None,
        tokens=tokens,
        text="",
        finish_reason="stop",
        stop_reason=None,
        logprobs=None,
    )


async def say(
    turns: Turns, added: list[int], generated: list[int], asked: Asked = ASKED
) -> Session:
    """A whole turn; what is in the store then."""
    turn = await turns.begin(asked)
    turn.prompt(added)
    for token in generated:
        turn.take([token])
    await turn.commit([], answer(generated))
    turn.release()
    session = await turns.store.get(asked.owner, asked.id)
    assert session
    return session


def refused(run: Run, call: Coroutine[Any, Any, Any], kind: type[SessionError]) -> str:
    """What a call that fails says."""
    with pytest.raises(kind) as raised:
        run(call)
    assert type(raised.value) is kind
    return str(raised.value)


def test_a_turn_is_stored_with_its_end(store: Store, run: Run) -> None:
    alone = turns(store)
    turn = run(alone.begin(ASKED))
    assert turn.prompt([1, 2, 3]) == [1, 2, 3]
    turn.take([4, 5])
    assert run(store.get("me", "a")) is None
    run(turn.commit([{"role": "assistant", "content": "Hm."}], answer([4, 5])))
    turn.release()
    session = run(store.get("me", "a"))
    assert (session.turn, session.position, session.tokens) == (1, 5, [1, 2, 3, 4, 5])
    assert session.history.count == 1
    assert session.answer is None
    second = run(say(alone, [6], [7]))
    assert (second.turn, second.position, second.tokens) == (2, 7, [1, 2, 3, 4, 5, 6, 7])
    assert second.created == session.created
    assert second.birth == session.birth


def test_a_turn_that_breaks_off_leaves_nothing(store: Store, run: Run) -> None:
    alone = turns(store)
    first = run(say(alone, [1, 2], [3]))
    turn = run(alone.begin(ASKED))
    turn.prompt([4])
    turn.take([5])
    turn.release()
    turn.release()
    assert run(store.get("me", "a")) == first
    assert not alone.under_way


def test_one_turn_at_a_time(store: Store, run: Run) -> None:
    alone = turns(store)
    turn = run(alone.begin(ASKED))
    assert "under way" in refused(run, alone.begin(ASKED), BusyError)
    others = [replace(ASKED, id="b"), replace(ASKED, owner="they")]
    for other in others:
        run(alone.begin(other))
    turn.release()
    again = run(alone.begin(ASKED))
    turn.release()
    assert alone.under_way["me", "a"] is again


def test_of_turns_that_begin_together_one_does(store: Store, run: Run) -> None:
    alone = turns(store)

    async def race() -> list[Any]:
        return await asyncio.gather(
            *(alone.begin(ASKED) for _ in range(50)), return_exceptions=True
        )

    begun = run(race())
    assert sum(isinstance(one, Turn) for one in begun) == 1
    assert sum(isinstance(one, ConflictError) for one in begun) == 49


@pytest.mark.parametrize("made", ["turns", "forks"])
def test_what_begins_together_counts_together(store: Store, run: Run, made: str) -> None:
    alone = turns(store, sessions=3)
    first = run(say(alone, [1], [2]))

    async def race() -> list[Any]:
        ids = [f"new-{i}" for i in range(20)]
        if made == "forks":
            calls: list[Any] = [alone.fork(first, id) for id in ids]
        else:
            calls = [say(alone, [1], [2], replace(ASKED, id=id)) for id in ids]
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = run(race())
    new = sum(isinstance(one, Session) for one in outcomes)
    assert sum(isinstance(one, LimitError) for one in outcomes) == 20 - new
    assert run(store.usage("me")).sessions == 1 + new
    assert not alone.under_way
    # One that is being made may count twice, not less than once; and in the end there is room.
    assert 1 <= new <= 2
    for one in range(new, 2):
        run(alone.fork(first, f"more-{one}"))
    refused(run, alone.fork(first, "too-many"), LimitError)


def test_a_call_that_is_cancelled_leaves_no_turn_under_way(store: Store, run: Run) -> None:
    alone = turns(store)

    async def cancelled() -> None:
        task = asyncio.create_task(alone.begin(ASKED))
        await asyncio.sleep(0)
        assert alone.under_way
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancelled())
    assert not alone.under_way


def test_conflicts_are_told_apart(store: Store, run: Run) -> None:
    """Two processes on one store."""
    one, other = turns(store), turns(store)

    def late() -> str:
        said = refused(run, turn.commit([], None), ConflictError)
        turn.release()
        return said

    turn = run(one.begin(ASKED))
    turn.prompt([1])
    run(say(other, [2], [3]))
    assert late() == "session 'a' exists already"
    turn = run(one.begin(ASKED))
    run(say(other, [4], [5]))
    assert late() == "another turn of session 'a' was committed meanwhile"
    turn = run(one.begin(ASKED))
    run(store.delete("me", "a"))
    assert late() == "session 'a' was deleted meanwhile"
    assert run(store.get("me", "a")) is None
    run(say(other, [1], [2]))
    turn = run(one.begin(ASKED))
    run(store.delete("me", "a"))
    taken = run(say(other, [3], [4]))
    assert late() == "session 'a' was deleted meanwhile, and another took its name"
    assert run(store.get("me", "a")) == taken
    assert not one.under_way


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"api": "completion"}, "begun with chat completions: it goes on with these"),
        ({"model": "other"}, "begun with model 'm'; asked is 'other'"),
        ({"tools": "others"}, "begun with other tools, or none"),
    ],
)
def test_what_does_not_go_with_a_session(
    store: Store, run: Run, changes: dict[str, Any], told: str
) -> None:
    alone = turns(store)
    asked = replace(ASKED, tools="some")
    run(say(alone, [1], [2], asked))
    assert told in refused(run, alone.begin(replace(asked, **changes)), ConflictError)
    assert not alone.under_way
    for tools in ("some", None):
        assert run(say(alone, [3], [4], replace(asked, tools=tools))).tools == "some"


@pytest.mark.parametrize(
    "id", ["", "a" * 129, "a/b", "a b", "é", "a\n", "\ud800", "a\0", ".", ".."]
)
def test_ids_that_none_has(store: Store, run: Run, id: str) -> None:
    alone = turns(store)
    assert "accepted are 1 to 128" in refused(run, alone.begin(replace(ASKED, id=id)), SessionError)
    assert not alone.under_way


KEYED = replace(ASKED, key="k", request="r")


def test_a_repeated_request_is_known(store: Store, run: Run) -> None:
    alone = turns(store)
    first = run(say(alone, [1], [2], KEYED))
    assert first.answer == answer([2])
    again = run(alone.begin(KEYED))
    assert again.is_repeated
    again.release()
    other = replace(KEYED, request="s")
    assert "another request" in refused(run, alone.begin(other), ConflictError)
    without = run(say(alone, [3], [4]))
    assert without.answer is None
    assert "not kept any more" in refused(run, alone.begin(KEYED), ConflictError)
    assert "another request" in refused(run, alone.begin(other), ConflictError)
    for key in range(REMEMBERED_REQUESTS):
        run(say(alone, [5], [6], replace(KEYED, key=str(key))))
    turn = run(alone.begin(KEYED))
    assert not turn.is_repeated


def test_what_has_no_key_is_no_repetition(store: Store, run: Run) -> None:
    alone = turns(store)
    run(say(alone, [1], [2]))
    assert not run(alone.begin(ASKED)).is_repeated


def test_a_repetition_needs_no_room(store: Store, run: Run) -> None:
    run(say(turns(store), [1], [2], KEYED))
    full = turns(store, sessions=1, stored_bytes=1)
    turn = run(full.begin(KEYED))
    assert turn.is_repeated
    turn.release()
    other = replace(KEYED, key="l")
    assert "bytes of sessions" in refused(run, full.begin(other), LimitError)


def test_limits(store: Store, run: Run) -> None:
    limited = turns(store, sessions=1, turns=2, turn_tokens=5)
    run(say(limited, [1], [2]))
    other = replace(ASKED, id="b")
    assert "1 sessions are there" in refused(run, limited.begin(other), LimitError)
    turn = run(limited.begin(ASKED))
    run(limited.begin(replace(other, owner="they")))
    third = replace(other, owner="others")
    assert "2 turns of sessions are under way" in refused(run, limited.begin(third), LimitError)
    with pytest.raises(LimitError, match="reads 5 tokens; accepted are fewer than 5 of a turn"):
        turn.prompt([1] * 5)
    assert turn.prompt([1] * 4)[2:] == [1] * 4
    turn.release()
    bytes_of = run(store.usage("me")).bytes
    run(turns(store, stored_bytes=bytes_of + 1).begin(ASKED))
    full = turns(store, stored_bytes=bytes_of)
    assert f"{bytes_of} bytes" in refused(run, full.begin(ASKED), LimitError)


def test_a_buffer_is_compacted_on_the_way(store: Store, run: Run) -> None:
    """At the mark, wherever in an answer that is; the position goes on."""
    alone = turns(store)
    session = run(say(alone, [*range(10)], [10, 11, 12]))
    assert session.tokens == [0, 1, 6, 7, 8, 9, 10, 11, 12]
    assert (session.position, session.buffered) == (13, 9)
    # At once or one by one is the same.
    turn = run(turns(store).begin(replace(ASKED, id="b")))
    turn.prompt([*range(10)])
    turn.take([10, 11, 12])
    assert (turn.tokens, turn.position) == (session.tokens, session.position)


def test_a_prompt_that_passes_the_mark_is_read_whole(store: Store, run: Run) -> None:
    turn = run(turns(store).begin(ASKED))
    assert turn.prompt([*range(LONGEST)]) == [*range(LONGEST)]
    turn.take([LONGEST])
    assert turn.tokens == [0, 1, 15, 16, 17, 18, 19, 20]


def test_room_is_made_for_a_prompt(store: Store, run: Run) -> None:
    """Before the mark, where it would not fit otherwise; and where that helps."""
    first = run(say(turns(store), [*range(10)], [10]))
    kept = [0, 1, 5, 6, 7, 8, 9, 10]
    for length, before in {9: first.tokens, 10: kept, 12: kept, 13: first.tokens}.items():
        turn = run(turns(store).begin(ASKED))
        assert turn.prompt([7] * length) == before + [7] * length
        assert turn.position == 11 + length
    assert run(store.get("me", "a")) == first


def test_without_a_buffer_all_is_kept(store: Store, run: Run) -> None:
    alone = turns(store, buffer=None)
    session = run(say(alone, [*range(10)], [*range(50)]))
    assert session.tokens == [*range(10), *range(50)]
    assert session.position == 60


def test_a_fork_goes_on_alone(store: Store, run: Run) -> None:
    alone = turns(store)
    first = run(say(alone, [1], [2], KEYED))
    forked = run(alone.fork(first, "b"))
    assert run(store.get("me", "b")) == forked
    assert (forked.tokens, forked.turn, forked.requests) == (first.tokens, first.turn, ())
    assert forked.birth != first.birth
    run(say(alone, [3], [4], replace(KEYED, id="b")))
    assert run(store.get("me", "a")) == first
    assert refused(run, alone.fork(first, "b"), ConflictError) == "session 'b' exists already"
    run(alone.begin(replace(ASKED, id="c")))
    assert "under way" in refused(run, alone.fork(first, "c"), BusyError)
    refused(run, alone.fork(first, "b/c"), SessionError)
    assert [*alone.under_way] == [("me", "c")]


@dataclass
class Kept:
    """What a session is to be."""

    tokens: list[int] = field(default_factory=list)
    position: int = 0
    turn: int = 0
    used: float = 0.0
    keys: tuple[str, ...] = ()
    birth: str = ""

    def said(self, added: list[int], generated: list[int], key: str, now: float) -> "Kept":
        tokens = [*self.tokens]
        if BUFFER.kept <= LONGEST - len(added) < len(tokens):
            tokens = tokens[: BUFFER.sinks] + tokens[-BUFFER.window :]
        tokens += added
        for token in generated:
            tokens.append(token)
            if len(tokens) >= BUFFER.mark:
                tokens = tokens[: BUFFER.sinks] + tokens[-BUFFER.window :]
        position = self.position + len(added) + len(generated)
        keys = (*self.keys, key)[-REMEMBERED_REQUESTS:]
        return Kept(tokens, position, self.turn + 1, now, keys, self.birth)

    @property
    def name(self) -> tuple[str, int]:
        """Tells it from what it was, and from others of its id."""
        return self.birth, self.turn


@dataclass
class Begun:
    """A turn under way in process `of`, and what its session was when it began."""

    turn: Turn
    of: int
    before: Kept | None
    added: list[int]
    generated: list[int] = field(default_factory=list)


IDS = st.sampled_from("abc")
PROCESSES = st.integers(0, 1)
TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=8)
KEYS = st.sampled_from(["", "", "k", "l"])


class Lives(RuleBasedStateMachine):
    """Sessions of two processes beside a dict of what they are to be.

    A process dies between any two steps; time passes; turns are begun, go on, and end as they may.
    """

    def __init__(self, place: Place, run: Run, clock: Clock) -> None:
        super().__init__()
        self.place, self.run, self.clock = place, run, clock
        self.kept: dict[str, Kept] = {}
        self.begun: dict[tuple[int, str], Begun] = {}
        self.processes = [self.process(), self.process()]
        for id in "abc":
            run(self.processes[0].store.delete("me", id))

    def process(self) -> Turns:
        store: Any = opened(self.place.address, TTL)
        store._clock = self.clock
        return Turns(store, BUFFER, LONGEST, clock=self.clock)

    def birth(self, of: int, id: str) -> str:
        return self.run(self.processes[of].store.get("me", id)).birth

    def there(self, id: str) -> Kept | None:
        kept = self.kept.get(id)
        return kept if kept and kept.used >= self.clock() - TTL else None

    @rule(of=PROCESSES, id=IDS, added=TOKENS, key=KEYS)
    def begin(self, of: int, id: str, added: list[int], key: str) -> None:
        asked = replace(ASKED, id=id, key=key, request=key and "r")
        call = self.processes[of].begin(asked)
        there = self.there(id)
        keys = there.keys if there and key else ()
        if (of, id) in self.begun:
            assert "under way" in refused(self.run, call, BusyError)
        elif key in keys[:-1]:
            assert "not kept any more" in refused(self.run, call, ConflictError)
        else:
            turn = self.run(call)
            assert turn.is_repeated == (keys[-1:] == (key,))
            if turn.is_repeated:
                assert turn.session.answer
                turn.release()
                return
            assert turn.tokens == (there.tokens if there else [])
            assert turn.prompt(added)[-len(added) :] == added
            self.begun[of, id] = Begun(turn, of, there, added)

    @rule(of=PROCESSES, id=IDS, tokens=TOKENS)
    def generate(self, of: int, id: str, tokens: list[int]) -> None:
        if begun := self.begun.get((of, id)):
            begun.turn.take(tokens)
            begun.generated += tokens

    @rule(of=PROCESSES, id=IDS)
    def commit(self, of: int, id: str) -> None:
        """As a turn's end does, and a hang-up where what was said is kept."""
        begun = self.begun.pop((of, id), None)
        if not begun:
            return
        there = self.there(id)
        call = begun.turn.commit([], answer(begun.generated))
        if (there and there.name) == (begun.before and begun.before.name):
            self.run(call)
            key = begun.turn.asked.key
            before = begun.before or Kept(birth=self.birth(of, id))
            self.kept[id] = before.said(begun.added, begun.generated, key, self.clock())
        else:
            refused(self.run, call, ConflictError)
        begun.turn.release()

    @rule(of=PROCESSES, id=IDS)
    def hang_up(self, of: int, id: str) -> None:
        if begun := self.begun.pop((of, id), None):
            begun.turn.release()

    @rule(of=PROCESSES, id=IDS)
    def delete(self, of: int, id: str) -> None:
        deleted = self.run(self.processes[of].store.delete("me", id))
        assert deleted == (self.there(id) is not None)
        self.kept.pop(id, None)

    @rule(of=PROCESSES, id=IDS, to=IDS)
    def fork(self, of: int, id: str, to: str) -> None:
        there = self.there(id)
        if not there:
            return
        session = self.run(self.processes[of].store.get("me", id))
        call = self.processes[of].fork(session, to)
        if (of, to) in self.begun:
            refused(self.run, call, BusyError)
            return
        if self.there(to):
            refused(self.run, call, ConflictError)
            return
        birth = self.run(call).birth
        self.kept[to] = replace(there, used=self.clock(), keys=(), birth=birth)

    @rule(seconds=st.sampled_from([1, 30, 61]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(of=PROCESSES)
    def crash(self, of: int) -> None:
        self.run(self.processes[of].store.close())
        self.processes[of] = self.process()
        self.begun = {key: begun for key, begun in self.begun.items() if begun.of != of}

    @invariant()
    def sessions_are_what_they_are_to_be(self) -> None:
        for id in "abc":
            there = self.there(id)
            session = self.run(self.processes[0].store.get("me", id))
            assert (session is None) == (there is None)
            if there:
                shown = session.tokens, session.position, session.turn, session.used
                assert shown == (there.tokens, there.position, there.turn, there.used)
                assert session.buffered == len(session.tokens)
                assert [name.partition(" ")[0] for name in session.requests] == [*there.keys]

    @invariant()
    def no_other_turn_is_under_way(self) -> None:
        for of, process in enumerate(self.processes):
            mine = {("me", id) for which, id in self.begun if which == of}
            assert {*process.under_way} == mine

    def teardown(self) -> None:
        for process in self.processes:
            self.run(process.store.close())


def test_lives_of_sessions(place: Place, run: Run, clock: Clock) -> None:
    run_state_machine_as_test(
        lambda: Lives(place, run, clock),
        settings=settings(
            max_examples=50, stateful_step_count=30, suppress_health_check=list(HealthCheck)
        ),
    )

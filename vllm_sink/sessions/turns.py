"""What a turn of a session does, against a store. Neither vLLM nor HTTP is known here.

A turn reads its session, and writes it back with what was said, if it is still what was read. What
happens between is its alone: a turn that breaks off leaves the session as it was.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_sink.buffer import Buffer
from vllm_sink.sessions.errors import BusyError, ConflictError, LimitError, SessionError
from vllm_sink.sessions.history import History, Message, called
from vllm_sink.sessions.session import Answer, Api, Session, new_birth
from vllm_sink.sessions.store import Store

ID = re.compile(r"(?!\.\.?$)[\w.:-]{1,128}", re.ASCII)
"""Clients take . and .. out of a path: such a session could not be shown or deleted."""
REMEMBERED_REQUESTS = 16
"""Turns whose idempotency keys are known: the answer of the last one alone is kept."""


@dataclass(frozen=True)
class Limits:
    """None: no limit."""

    sessions: int | None = None
    """Of an owner, as `stored_bytes` are."""
    stored_bytes: int | None = None
    turn_tokens: int | None = None
    """That a turn reads and generates."""
    turns: int | None = None
    """Under way at once in this process, waiting ones included."""


@dataclass(frozen=True)
class Asked:
    """What a request asks of its session."""

    owner: str
    id: str
    api: Api
    model: str
    tools: str | None = None
    """A digest of them, where it names tools."""
    key: str = ""
    """A digest of its idempotency key, where it has one, ..."""
    request: str = ""
    """... and of the whole request."""
    keeps_partial: bool = False
    """Whether what was generated stays, should the client hang up."""


@dataclass(eq=False)
class Turn:
    """One that is under way. Its session takes no other until `release` is called."""

    asked: Asked
    session: Session | None
    """As it stands in the store."""
    turns: "Turns"
    asks_engine: bool = False
    """Whether the engine is asked; then whoever asks it releases the turn."""
    committed: bool = False
    history: History = field(default_factory=History)
    """With the messages of the request."""
    tokens: list[int] = field(default_factory=list)
    """The buffer, as far as the stream has come."""
    position: int = 0

    def __post_init__(self) -> None:
        if self.session:
            self.history = self.session.history
            self.tokens = [*self.session.tokens]
            self.position = self.session.position

    @property
    def is_repeated(self) -> bool:
        """Whether it was committed before, by a request with the same key."""
        known = self.session.requests if self.session else ()
        return bool(self.asked.key) and bool(known) and known[-1] == self.name

    @property
    def name(self) -> str:
        """By which a repeated request is known."""
        return self.asked.key and f"{self.asked.key} {self.asked.request}"

    def prompt(self, added: list[int]) -> list[int]:
        """Take in what the request adds; what is to be read then.

        A buffer that would leave no room for it is compacted first, before its mark.

        Raises:
            LimitError: it is more than a turn may read.
        """
        limit = self.turns.limits.turn_tokens
        if limit is not None and len(added) >= limit:
            raise LimitError(
                f"the turn reads {len(added)} tokens; accepted are fewer than {limit} of a turn, "
                "its answer included"
            )
        buffer = self.turns.buffer
        room = self.turns.longest_prompt - len(added)
        if buffer and buffer.kept <= room < len(self.tokens):
            self.tokens = buffer.compact(self.tokens)
        self.tokens += added
        self.position += len(added)
        return [*self.tokens]

    def take(self, generated: Sequence[int]) -> None:
        buffer = self.turns.buffer
        self.position += len(generated)
        if buffer:
            self.tokens = buffer.extended(self.tokens, generated)
        else:
            self.tokens += generated

    async def commit(self, said: Sequence[Message], answer: Answer | None) -> None:
        """`said`: the message that the answer is, where there are messages. After an error it may
        be tried again.

        Raises:
            ConflictError: the session is not any more what it was when the turn began.
            StoreError: it could not be stored.
        """
        asked, before, now = self.asked, self.session, self.turns.clock()
        requests = (*(before.requests if before else ()), self.name)[-REMEMBERED_REQUESTS:]
        kept = {"birth": before.birth, "created": before.created} if before else {"created": now}
        session = Session(
            id=asked.id,
            owner=asked.owner,
            turn=before.turn + 1 if before else 1,
            position=self.position,
            buffered=len(self.tokens),
            model=asked.model,
            api=asked.api,
            used=now,
            tokens=self.tokens,
            history=self.history.after(said),
            calls=tuple(called(said)),
            tools=before.tools if before else asked.tools,
            requests=requests,
            answer=answer if asked.key else None,
            **kept,
        )
        await self.turns.store.put(session, before)
        self.committed = True

    def release(self) -> None:
        """Let other turns have the session; a second time it is to no effect."""
        if self.turns.under_way.get((self.asked.owner, self.asked.id)) is self:
            del self.turns.under_way[self.asked.owner, self.asked.id]


@dataclass
class Turns:
    """Those of one process."""

    store: Store
    buffer: Buffer | None
    """None: streams are not compacted."""
    longest_prompt: int
    """In tokens."""
    limits: Limits = field(default_factory=Limits)
    clock: Callable[[], float] = time.time
    under_way: dict[tuple[str, str], Turn | None] = field(default_factory=dict)
    """None while a session is being read."""

    async def begin(self, asked: Asked) -> Turn:
        """Raises:
        SessionError: there is to be no such turn.
        """
        check_id(asked.id)
        place = asked.owner, asked.id
        if place in self.under_way:
            raise BusyError(f"a turn of session {asked.id!r} is under way; one at a time")
        if self.limits.turns is not None and len(self.under_way) >= self.limits.turns:
            raise LimitError(
                f"{len(self.under_way)} turns of sessions are under way; accepted are "
                f"{self.limits.turns}"
            )
        self.under_way[place] = None
        try:
            session = await self.store.get(*place)
            turn = self.under_way[place] = Turn(asked, session, self)
            if session:
                check(asked, session)
            if not turn.is_repeated:
                await self.check_usage(asked.owner, is_new=session is None)
        except BaseException:
            del self.under_way[place]
            raise
        return turn

    async def fork(self, session: Session, id: str) -> Session:
        """One of another id, that begins where `session` stands.

        It is made as a first turn is: what is under way counts as forks do.

        Raises:
            SessionError: there is to be no such fork.
        """
        turn = await self.begin(Asked(session.owner, id, session.api, session.model))
        try:
            if turn.session:
                raise ConflictError(f"session {id!r} exists already")
            now = self.clock()
            own: dict[str, Any] = {"id": id, "birth": new_birth(), "created": now, "used": now}
            forked = session.model_copy(update=own | {"requests": (), "answer": None})
            await self.store.put(forked, None)
        finally:
            turn.release()
        return forked

    async def check_usage(self, owner: str, is_new: bool) -> None:
        """Whether an owner may have one more turn, or one more session.

        Raises:
            LimitError: there is no room for it.
        """
        limits = self.limits
        if limits.sessions is None and limits.stored_bytes is None:
            return
        # Counted first: what is stored in the meantime is in the usage, or was counted here.
        being_made = sum(
            turn is not None and turn.session is None and place[0] == owner
            for place, turn in self.under_way.items()
        )
        usage = await self.store.usage(owner)
        if is_new and limits.sessions is not None and usage.sessions + being_made > limits.sessions:
            raise LimitError(
                f"{usage.sessions} sessions are there, {being_made - 1} others are being made; "
                f"accepted are {limits.sessions} of a key: deleting one makes room"
            )
        if limits.stored_bytes is not None and usage.bytes >= limits.stored_bytes:
            raise LimitError(
                f"{usage.bytes} bytes of sessions are stored; accepted are fewer than "
                f"{limits.stored_bytes} of a key: deleting a session makes room"
            )


def check_id(id: str) -> None:
    """Raises:
    SessionError: no session can have it.
    """
    if not ID.fullmatch(id):
        raise SessionError(
            f"session_id={id[:128]!r}: accepted are 1 to 128 letters, digits and . _ : -, "
            "but not . and .."
        )


def check(asked: Asked, session: Session) -> None:
    """Raises:
    ConflictError: the request does not go with the session.
    """
    if asked.api != session.api:
        other = "chat completions" if session.api == "chat" else "completions"
        raise ConflictError(f"session {asked.id!r} was begun with {other}: it goes on with these")
    if asked.model != session.model:
        raise ConflictError(
            f"session {asked.id!r} was begun with model {session.model!r}; asked is "
            f"{asked.model!r}, which may have other tokens"
        )
    if asked.tools is not None and asked.tools != session.tools:
        raise ConflictError(
            f"session {asked.id!r} was begun with other tools, or none, which its stream has: "
            "accepted are the same or none"
        )
    if not asked.key:
        return
    for place, known in enumerate(session.requests):
        key, _, request = known.partition(" ")
        if key != asked.key:
            continue
        if request != asked.request:
            raise ConflictError("the Idempotency-Key was used for another request of this session")
        if place < len(session.requests) - 1:
            raise ConflictError(
                "the Idempotency-Key was used for an earlier turn of this session, whose answer "
                "is not kept any more"
            )

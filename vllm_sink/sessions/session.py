"""A session: what is kept of a conversation to go on with it, and its form in a store."""

import json
import secrets
import zlib
from array import array
from base64 import b64decode, b64encode
from typing import Any, Final, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
)

from vllm_sink.sessions.errors import UnreadableError
from vllm_sink.sessions.history import History

VERSION: Final = 1
"""Of the form in a store. Every release reads all that are older."""
Api = Literal["chat", "completion"]


def new_birth() -> str:
    return secrets.token_hex(8)


class Row(NamedTuple):
    """A session as a store keeps it."""

    head: bytes
    """JSON: the version, and what lists of sessions show."""
    body: bytes
    """The rest: JSON, compressed."""
    checksum: int
    """CRC-32 of both."""

    @property
    def size(self) -> int:
        return len(self.head) + len(self.body)


class Answer(BaseModel):
    """An answer that is kept whole, for a client that may ask again."""

    # A log-probability may be minus infinity.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    prompt_tokens: int
    cached_tokens: int
    cache_creation_tokens: int | None
    tokens: list[int]
    text: str
    finish_reason: str
    stop_reason: int | str | None
    logprobs: list[list[tuple[int, float, int | None, str | None]]] | None
    """For each token, of those whose log-probability was asked for: id, log-probability, rank and
    text."""


class Head(BaseModel):
    """What a list of sessions shows."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = VERSION
    id: str
    owner: str
    """A digest of the API key that made it; empty where the server has none."""
    birth: str = Field(default_factory=new_birth)
    """Tells it from another session of the same name, before or after it."""
    turn: int
    """Turns that were committed."""
    position: int
    """Tokens of the stream."""
    buffered: int
    """Tokens of the buffer."""
    model: str
    api: Api
    created: float
    """Seconds since 1970, as `used`."""
    used: float


class Session(Head):
    tokens: list[int]
    """The stream's buffer."""
    history: History = History()
    """The messages that it has, or rather their digests."""
    calls: tuple[str, ...] = ()
    """The functions that the last answer calls."""
    tools: str | None = None
    """A digest of the tools that it began with."""
    requests: tuple[str, ...] = ()
    """Of the last turns, oldest first: digests of idempotency key and request, both empty where
    there was no key."""
    answer: Answer | None = None
    """The last one, where its request had an idempotency key."""

    @field_serializer("tokens", when_used="json")
    def _packed(self, tokens: list[int]) -> str:
        return b64encode(array("I", tokens).tobytes()).decode()

    @field_validator("tokens", mode="before")
    @classmethod
    def _unpacked(cls, tokens: Any) -> Any:
        return [*array("I", b64decode(tokens))] if isinstance(tokens, str) else tokens

    def encode(self) -> Row:
        heads = set(Head.model_fields)
        head = self.model_dump_json(include=heads).encode()
        body = zlib.compress(self.model_dump_json(exclude=heads).encode(), 1)
        return Row(head, body, zlib.crc32(head + body))

    @classmethod
    def decode(cls, id: str, row: Row) -> "Session":
        """Raises:
        UnreadableError: the row is damaged, or of an unknown version.
        """
        fields = decode_head(id, row.head)
        if zlib.crc32(row.head + row.body) != row.checksum:
            raise damaged(id)
        return cls.model_validate(fields.model_dump() | json.loads(zlib.decompress(row.body)))


def decode_head(id: str, head: bytes) -> Head:
    """Raises:
    UnreadableError: it is damaged, or of an unknown version.
    """
    try:
        fields = json.loads(head)
        version = fields["version"]
    except (ValueError, LookupError, TypeError):
        raise damaged(id) from None
    if version != VERSION:
        raise UnreadableError(
            f"session {id!r} is stored in version {version} of its format; this release reads "
            f"version {VERSION}"
        )
    try:
        return Head.model_validate(fields)
    except ValidationError:
        raise damaged(id) from None


def damaged(id: str) -> UnreadableError:
    return UnreadableError(
        f"session {id!r} is damaged in its store and cannot go on; deleted, its id is free again"
    )

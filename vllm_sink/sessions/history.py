"""Which messages a session has: told by digests, so that it need not keep them."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_sink.sessions.errors import ConflictError, SessionError

Message = Mapping[str, Any]

KEPT = 32
"""Digests of the last messages, by which a contradiction is found."""
SPOKEN_BY_CLIENTS = {"user", "tool"}
"""Messages of other roles alone come with a history."""


class History(BaseModel):
    """The messages of a session, each digest being of its message and of all before it."""

    model_config = ConfigDict(frozen=True)

    count: int = 0
    digests: tuple[str, ...] = ()
    """Of the last messages, oldest first."""

    def after(self, messages: Sequence[Message]) -> "History":
        """With `messages` behind those that it has."""
        digests = list(self.digests)
        for message in messages:
            digests.append(chained(digests[-1] if digests else "", message))
        return History(count=self.count + len(messages), digests=tuple(digests[-KEPT:]))

    def new(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Those that the session does not have, of a request that has either all or new ones alone.

        Raises:
            ConflictError: they begin with a history that is not the session's.
            SessionError: none is new, or there.
        """
        if not messages:
            raise SessionError("messages: none is there; accepted is one at least")
        if {message["role"] for message in messages} <= SPOKEN_BY_CLIENTS or not self.count:
            return messages
        digests = list(History().chain(messages[: self.count]))
        if len(digests) == self.count and digests[-1] == self.digests[-1]:
            if len(messages) == self.count:
                raise SessionError("the session has all of these messages: none is new")
            return messages[self.count :]
        raise ConflictError(self.contradiction(digests))

    @staticmethod
    def chain(messages: Sequence[Message]) -> Sequence[str]:
        digests: list[str] = []
        for message in messages:
            digests.append(chained(digests[-1] if digests else "", message))
        return digests

    def contradiction(self, digests: Sequence[str]) -> str:
        """From where a history with other digests is not that of the session."""
        oldest = self.count - len(self.digests)
        same = [
            place
            for place, digest in enumerate(self.digests, oldest)
            if place < len(digests) and digests[place] == digest
        ]
        if len(digests) <= oldest or (same and same[-1] + 1 == len(digests)):
            return (
                f"the history ends after {len(digests)} messages, the session has {self.count}; "
                "send all of them and new ones, or new ones alone"
            )
        if same or not oldest:
            first = same[-1] + 1 if same else 0
            return f"the history differs from what the session has, from messages[{first}] on"
        return (
            "the history differs from what the session has, in one of its first "
            f"{oldest + 1} messages"
        )


def chained(before: str, message: Message) -> str:
    """A digest of a message and of what came before it.

    Of what a client may change in a message that it sends back, nothing counts: white space around
    its text, ids of tool calls, the order of an argument's keys, reasoning.
    """
    said = [before, message["role"], text(message.get("content"))]
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {"name": str(call)}
        said += [function["name"], canonical(function.get("arguments") or "{}")]
    return sha256(json.dumps(said).encode()).hexdigest()[:32]


def called(messages: Sequence[Message]) -> list[str]:
    """The functions that they call."""
    return [
        call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()
    ]


def text(content: Any) -> str:
    """Of a content that is a string, a list of parts of text, or missing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content.strip()
    parts = (part if isinstance(part, str) else part.get("text") or "" for part in content)
    return "\n".join(parts).strip()


def canonical(arguments: Any) -> str:
    """Of a tool call's arguments, a JSON document as a string or as an object."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return str(arguments)
    return json.dumps(arguments, sort_keys=True)

"""Where sessions are kept: the interface that turns and routes know."""

from dataclasses import dataclass
from typing import Protocol

from vllm_sink.sessions.errors import ConflictError
from vllm_sink.sessions.session import Head, Session


@dataclass(frozen=True)
class Usage:
    """What an owner has in a store."""

    sessions: int
    bytes: int


class Store(Protocol):
    """Sessions by owner and id; those that were not used for longer than the store keeps them are
    not there. Every method raises `StoreError` where the store cannot be asked."""

    async def get(self, owner: str, id: str) -> Session | None:
        """Raises:
        UnreadableError: its row is damaged, or of an unknown version.
        """
        ...

    async def put(self, session: Session, before: Head | None) -> None:
        """Keep `session`, durably, in place of `before`, which is what the caller read; None: there
        was none.

        After a `StoreError` it is not known whether that came about. It may be tried again: to put
        what is there already changes nothing.

        Raises:
            ConflictError: `before` is not what is there now. Nothing was changed.
        """
        ...

    async def delete(self, owner: str, id: str) -> bool:
        """Whether there was one; its tokens are overwritten. A damaged row is deleted too."""
        ...

    async def list(self, owner: str, after: str, limit: int) -> list[Head]:
        """Those whose ids come after `after`, in the order of their ids' bytes.

        Raises:
            UnreadableError: one of them is damaged, or of an unknown version.
        """
        ...

    async def usage(self, owner: str) -> Usage: ...

    async def close(self) -> None: ...


def conflict(id: str, before: Head | None, birth: str | None) -> ConflictError:
    """What became of `before`, where a session of another `birth` or turn, or none, is there."""
    if before is None:
        return ConflictError(f"session {id!r} exists already")
    if birth == before.birth:
        return ConflictError(f"another turn of session {id!r} was committed meanwhile")
    if birth is None:
        return ConflictError(f"session {id!r} was deleted meanwhile")
    return ConflictError(f"session {id!r} was deleted meanwhile, and another took its name")

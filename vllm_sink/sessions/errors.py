"""What a client is told when its session cannot do what it asked: one sentence and a status."""

from http import HTTPStatus


class SessionError(Exception):
    """A turn, or what else was asked of a session, that does not come about.

    It left nothing behind: the session stands where it stood.
    """

    status = HTTPStatus.BAD_REQUEST
    retry_after: int | None = None
    """Seconds, where waiting helps."""


class NotFoundError(SessionError):
    status = HTTPStatus.NOT_FOUND


class ConflictError(SessionError):
    """Somebody else was faster, or the client and the session disagree on what was said."""

    status = HTTPStatus.CONFLICT


class BusyError(ConflictError):
    """Another turn of the session is under way."""

    retry_after = 1


class LimitError(SessionError):
    status = HTTPStatus.TOO_MANY_REQUESTS
    retry_after = 1


class UnreadableError(SessionError):
    """A row that is damaged, or of a format from another time."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR


class StoreError(SessionError):
    """The store does not answer or does not take what it is given; it may do so later."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    retry_after = 5

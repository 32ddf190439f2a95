"""Routes of sessions in vLLM's server, and what its handlers need to serve them.

Seam: entry point group `vllm.endpoint_plugins` (vllm/plugins/endpoint_plugins/interface.py).
"""

import secrets
from argparse import Namespace
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import State
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

from vllm_sink.plugin import residency
from vllm_sink.plugin.config import buffer_of, settings_of
from vllm_sink.sessions.engine import TurnEngine, TurnFailedError
from vllm_sink.sessions.errors import NotFoundError, SessionError
from vllm_sink.sessions.handlers import (
    ChatHandler,
    CompletionHandler,
    Sessions,
    digest,
    salt,
)
from vllm_sink.sessions.metrics import SessionMetrics
from vllm_sink.sessions.session import Head, Session
from vllm_sink.sessions.stores import opened
from vllm_sink.sessions.turns import Limits, Turns, check_id
from vllm_sink.settings import SettingsError

NAME = "sink_sessions"
"""Of the entry point."""
PAGE = 100
"""Sessions of a list at once, at most."""

Id = Annotated[str, Field(description="1 to 128 letters, digits and . _ : -")]
ERRORS: dict[int | str, dict[str, Any]] = {
    status.value: {"model": ErrorResponse}
    for status in (
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
}


class SessionObject(BaseModel):
    id: str
    object: Literal["session"] = "session"
    model: str
    position: int = Field(description="Tokens of the stream.")
    buffered_tokens: int = Field(description="Tokens that are kept of it.")
    turns: int
    created: float = Field(description="Seconds since 1970, as last_used.")
    last_used: float

    @classmethod
    def of(cls, head: Head) -> "SessionObject":
        return cls(
            id=head.id,
            model=head.model,
            position=head.position,
            buffered_tokens=head.buffered,
            turns=head.turn,
            created=head.created,
            last_used=head.used,
        )


class SessionDetails(SessionObject):
    resident_tokens: int | None = Field(
        description="Tokens of the buffer that the next turn finds in the prefix cache, as of now; "
        "null where nothing is evicted."
    )


class SessionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SessionObject]
    has_more: bool


class DeletedSession(BaseModel):
    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: Literal[True] = True


class Fork(BaseModel):
    session_id: Id | None = Field(None, description="Of the new session; by default a random one.")


router = APIRouter(prefix="/v1/sessions", tags=["Sessions"], responses=ERRORS)


def sessions_of(request: Request) -> Sessions:
    sessions: Sessions = request.app.state.sink_sessions
    return sessions


Served = Annotated[Sessions, Depends(sessions_of)]


@router.get("", summary="List sessions")
async def list_sessions(
    request: Request,
    sessions: Served,
    after: Annotated[str, Query(description="The id that the page comes after.")] = "",
    limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
) -> SessionList:
    heads = await sessions.turns.store.list(sessions.owner(request), after, limit + 1)
    data = [SessionObject.of(head) for head in heads[:limit]]
    return SessionList(data=data, has_more=len(heads) > limit)


@router.get("/{session_id}", summary="Show a session")
async def show_session(request: Request, sessions: Served, session_id: Id) -> SessionDetails:
    session = await found(sessions, request, session_id)
    resident = None
    if sessions.sinks is not None:
        own_salt = salt(session.owner, None) if sessions.isolated else None
        resident = await residency.ask(sessions.engine.engine, session.tokens, own_salt)
    return SessionDetails(**SessionObject.of(session).model_dump(), resident_tokens=resident)


@router.delete("/{session_id}", summary="Delete a session and what is kept of its text")
async def delete_session(request: Request, sessions: Served, session_id: Id) -> DeletedSession:
    check_id(session_id)
    if not await sessions.turns.store.delete(sessions.owner(request), session_id):
        raise missing(session_id)
    return DeletedSession(id=session_id)


@router.post("/{session_id}/fork", summary="Begin a session where another one stands")
async def fork_session(
    request: Request, sessions: Served, session_id: Id, fork: Fork | None = None
) -> SessionObject:
    session = await found(sessions, request, session_id)
    id = fork.session_id if fork and fork.session_id is not None else secrets.token_hex(16)
    return SessionObject.of(await sessions.turns.fork(session, id))


async def found(sessions: Sessions, request: Request, id: str) -> Session:
    check_id(id)
    session = await sessions.turns.store.get(sessions.owner(request), id)
    if session is None:
        raise missing(id)
    return session


def missing(id: str) -> NotFoundError:
    return NotFoundError(f"session {id!r} does not exist")


class SessionEndpoints:
    """vLLM's interface for what adds routes to its server."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        for failure in (SessionError, TurnFailedError):
            app.exception_handler(failure)(refuse)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        assert engine_client is not None
        if not hasattr(args, "session_store"):
            raise SettingsError(
                f"VLLM_PLUGINS: {NAME!r} is for python -m vllm_sink.serve, whose flags say where "
                "sessions are kept"
            )
        vllm_config = engine_client.vllm_config
        model_config = vllm_config.model_config
        settings = settings_of(vllm_config)
        metrics = SessionMetrics(model_config.served_model_name)
        limits = Limits(
            sessions=args.session_limit,
            stored_bytes=args.session_bytes_limit,
            turn_tokens=args.session_turn_limit,
            turns=args.session_turns_limit,
        )
        turns = Turns(
            opened(args.session_store, args.session_ttl),
            buffer_of(vllm_config),
            # One token of an answer at least comes behind it.
            longest_prompt=model_config.max_model_len - 1,
            limits=limits,
        )
        sessions = Sessions(
            turns=turns,
            engine=TurnEngine(engine_client, metrics),
            owner=owners(args),
            sinks=settings.sinks if settings and settings.evicts else None,
            isolated=args.session_isolation,
        )
        state.sink_sessions = sessions
        ChatHandler(state.openai_serving_chat, sessions)
        CompletionHandler(state.openai_serving_completion, sessions)


def owners(args: Namespace) -> Callable[[Request], str]:
    """Who a request's session belongs to: a digest of its key; with no keys, everybody is one."""
    has_keys = any(args.api_key or [envs.VLLM_API_KEY])

    def owner(request: Request) -> str:
        key = request.headers.get("Authorization", "").partition(" ")[2]
        return digest(key) if has_keys else ""

    return owner


async def refuse(request: Request, error: SessionError | TurnFailedError) -> JSONResponse:
    """One sentence, in the form of vLLM's errors."""
    if isinstance(error, SessionError):
        request.app.state.sink_sessions.engine.metrics.refused(error)
        status = error.status
    else:
        status = error.status_code
    told = ErrorInfo(message=f"{error}.", type=status.phrase, code=status.value)
    retry = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(ErrorResponse(error=told).model_dump(), status.value, headers=retry)

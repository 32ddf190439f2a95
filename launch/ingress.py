"""What answers clients: it sends each request to a replica, those of a session to the same one."""

import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from launch.exchange import Forwarded
from vllm_sink.sessions.turns import ID

SESSIONS = "/v1/sessions/"
HEADER = "X-Session-ID"
RETRY_SECONDS = 1


class Ingress:
    def __init__(self, replicas: DeploymentHandle) -> None:
        self.replicas = replicas.options(stream=True, method_name="http")

    async def __call__(self, request: Request) -> Response:
        forwarded = await Forwarded.of(request)
        session = session_of(request, forwarded.body)
        handle = self.replicas.options(session_id=session) if session else self.replicas
        answer = handle.remote(forwarded)
        try:
            status, headers = await anext(answer)
        except BackPressureError:
            return refused(HTTPStatus.TOO_MANY_REQUESTS, "all replicas have as much as they take")
        except (RayActorError, DeploymentUnavailableError):
            return refused(HTTPStatus.SERVICE_UNAVAILABLE, "the replica was lost")
        except BaseException:
            answer.cancel()
            raise
        response = StreamingResponse(body(answer), status)
        response.raw_headers = headers
        return response


def session_of(request: Request, body: bytes) -> str | None:
    """The id that vLLM will see (`_get_session_id`, vllm/entrypoints/generate/base/serving.py), or
    that a route of sessions names. What is no id is for any replica to refuse."""
    named = named_by(request, body)
    return named if named and ID.fullmatch(named) else None


def named_by(request: Request, body: bytes) -> str | None:
    if request.url.path.startswith(SESSIONS):
        return request.url.path.removeprefix(SESSIONS).partition("/")[0]
    try:
        asked: Any = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        asked = {}
    asked = asked if isinstance(asked, dict) else {}
    extra = asked.get("vllm_xargs")
    names = [asked.get("session_id"), request.headers.get(HEADER)]
    names += [extra.get("session_id")] if isinstance(extra, dict) else []
    return next((name for name in names if isinstance(name, str) and name), None)


async def body(answer: DeploymentResponseGenerator[Any]) -> AsyncIterator[bytes]:
    """The rest of an answer; a client that hangs up on it hangs up on the replica."""
    try:
        async for part in answer:
            yield part
    finally:
        answer.cancel()


def refused(status: HTTPStatus, why: str) -> JSONResponse:
    """In the form of vLLM's errors."""
    error = {"message": f"{why}; try again.", "type": status.phrase, "code": status.value}
    return JSONResponse({"error": error}, status, {"Retry-After": str(RETRY_SECONDS)})

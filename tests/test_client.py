"""Against a server that breaks off answers, and repeats what it has committed."""

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from launch.server import free_port
from vllm_sink.client import BEGIN, BrokenTurnError, turn

WORDS = ["one", "two", "three"]


class Script:
    """What the server does with each request, in order."""

    def __init__(self) -> None:
        self.deeds: list[str] = []
        self.keys: list[str] = []

    async def answer(self, request: Request) -> Response:
        self.keys.append(request.headers["Idempotency-Key"])
        assert (await request.json())["stream"]
        deed = self.deeds.pop(0)
        if deed == "refuse":
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        if deed == "busy":
            return JSONResponse({"error": {"message": "busy"}}, 409, {"Retry-After": "1"})
        return StreamingResponse(self.words(deed), media_type="text/event-stream")

    async def words(self, deed: str) -> AsyncIterator[str]:
        for word in WORDS[: 2 if deed != "whole" else None]:
            yield f"data: {json.dumps({'word': word})}\n\n"
        if deed == "cut":
            raise ConnectionError
        if deed == "error":
            yield f"data: {json.dumps({'error': {'message': 'engine died'}})}\n\n"
        if deed != "silent end":
            yield "data: [DONE]\n\n"


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def http(script: Script) -> Iterator[httpx.Client]:
    port = free_port()
    app = Starlette(routes=[Route("/turn", script.answer, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        yield client
    server.should_exit = True
    thread.join()


def words(chunks: Iterator[dict[str, Any]]) -> list[str | None]:
    return [None if chunk is BEGIN else chunk["word"] for chunk in chunks]


def test_a_whole_answer_is_asked_for_once(http: httpx.Client, script: Script) -> None:
    script.deeds = ["whole"]
    assert words(turn(http, "/turn", {})) == WORDS


@pytest.mark.parametrize("deed", ["cut", "silent end", "error"])
def test_an_answer_that_breaks_off_is_asked_for_again(
    http: httpx.Client, script: Script, deed: str
) -> None:
    script.deeds = [deed, "busy", "whole"]
    assert words(turn(http, "/turn", {}, key="k")) == ["one", "two", None, None, *WORDS]
    assert script.keys == ["k"] * 3


def test_keys_of_turns_differ(http: httpx.Client, script: Script) -> None:
    script.deeds = ["whole", "whole"]
    for _ in range(2):
        words(turn(http, "/turn", {}))
    assert len(set(script.keys)) == 2


def test_what_is_refused_is_refused(http: httpx.Client, script: Script) -> None:
    script.deeds = ["refuse"]
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        words(turn(http, "/turn", {}))


def test_at_last_it_gives_up(http: httpx.Client, script: Script) -> None:
    script.deeds = ["cut"] * 100
    with pytest.raises((BrokenTurnError, httpx.TransportError)):
        words(turn(http, "/turn", {}, seconds=1))
    assert len(script.keys) > 1


def test_who_has_heard_enough_may_leave(http: httpx.Client, script: Script) -> None:
    script.deeds = ["whole"]
    chunks = turn(http, "/turn", {})
    assert next(chunks) == {"word": "one"}
    chunks.close()
    assert script.deeds == []

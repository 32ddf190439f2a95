import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from launch.exchange import Forwarded, exchange, running

left: list[str] = []


async def echo(request: Request) -> Response:
    said = {"method": request.method, "url": str(request.url), "body": (await request.body()).hex()}
    return JSONResponse(said | {"header": request.headers["x-one"]}, 418, {"X-Two": "2"})


async def count(request: Request) -> Response:
    async def numbers() -> AsyncIterator[str]:
        try:
            for i in range(1_000_000):
                yield f"{i} "
                await asyncio.sleep(0)
        finally:
            left.append("count")

    return StreamingResponse(numbers())


async def fail(request: Request) -> Response:
    raise RuntimeError("broken")


APP = Starlette(
    routes=[Route("/echo", echo, methods=["PUT"]), Route("/count", count), Route("/fail", fail)]
)


def forwarded(path: str, method: str = "GET", body: bytes = b"") -> Forwarded:
    scope = {
        "type": "http",
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "root_path": "",
        "query_string": b"a=1",
        "headers": [(b"host", b"there"), (b"x-one", b"1")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "extensions": {"not": lambda: "carried"},
    }
    chunks = [body[:1], body[1:]]

    async def receive() -> Any:
        return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

    return asyncio.run(Forwarded.of(Request(scope, receive)))


def test_an_app_gets_the_whole_request_and_its_answer_comes_whole() -> None:
    async def answer() -> list[Any]:
        return [part async for part in exchange(APP, forwarded_echo)]

    forwarded_echo = forwarded("/echo", "PUT", b"\x00\xff\x01")
    assert "extensions" not in forwarded_echo.scope
    (status, headers), *parts = asyncio.run(answer())
    assert status == 418
    assert (b"x-two", b"2") in headers
    assert JSONResponse(
        {"method": "PUT", "url": "http://there/echo?a=1", "body": "00ff01", "header": "1"}
    ).body == b"".join(parts)


def test_an_app_is_left_when_its_answer_is_closed() -> None:
    async def hang_up() -> None:
        async with aclosing(exchange(APP, forwarded_count)) as answer:
            parts = [await anext(answer) for _ in range(4)]
        assert parts[1:] == [b"0 ", b"1 ", b"2 "]
        async with asyncio.timeout(10):
            await asyncio.gather(*running)

    forwarded_count = forwarded("/count")
    left.clear()
    asyncio.run(hang_up())
    assert left == ["count"]


def test_an_app_that_fails_fails_here() -> None:
    async def answer() -> list[Any]:
        return [part async for part in exchange(APP, forwarded_fail)]

    forwarded_fail = forwarded("/fail")
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(answer())

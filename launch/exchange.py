"""An HTTP request that is answered by an ASGI app in another process."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message

CARRIED = {
    *("type", "http_version", "asgi", "scheme", "method", "path", "raw_path", "root_path"),
    *("query_string", "headers", "client", "server"),
}
"""What of a request's scope means something in another process."""

Answer = tuple[int, list[tuple[bytes, bytes]]] | bytes
"""Status and headers first; then the body, as it comes."""


@dataclass(frozen=True)
class Forwarded:
    scope: dict[str, Any]
    body: bytes

    @classmethod
    async def of(cls, request: Request) -> "Forwarded":
        scope = {key: request.scope[key] for key in CARRIED & request.scope.keys()}
        return cls(scope, await request.body())


async def exchange(app: ASGIApp, forwarded: Forwarded) -> AsyncGenerator[Answer, None]:
    """What `app` answers. To close it early is to hang up on `app`, which then ends by itself."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    bodies = [forwarded.body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    task = asyncio.ensure_future(app(forwarded.scope, receive, messages.put))
    running.add(task)
    task.add_done_callback(running.discard)
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while message := await messages.get():
            if message["type"] == "http.response.start":
                yield message["status"], [*message["headers"]]
            else:
                yield message["body"]
        await task
    finally:
        left.set()


running: set[asyncio.Future[None]] = set()
"""Held here: a loop holds none."""

"""A turn that its client gets whole, whatever breaks on the way.

A server or a replica that dies in the middle of an answer ends it without `[DONE]`. The same
request with the same `Idempotency-Key` then gets the answer that was committed, or generates it if
none was: a turn is neither lost nor done twice.
"""

import json
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

BEGIN: dict[str, Any] = {}
"""In a stream of chunks: those before it are void, the answer comes anew."""


class BrokenTurnError(Exception):
    """The answer did not come to its end."""


def turn(
    client: httpx.Client,
    path: str,
    body: dict[str, Any],
    key: str | None = None,
    seconds: float = 300,
) -> Iterator[dict[str, Any]]:
    """The chunks of an answer, which is asked for again until it has come to its end.

    `client` has the server's address and the API key; `path` is `/v1/chat/completions` or
    `/v1/completions`. Before each new try comes `BEGIN`. What is refused without `Retry-After` is
    final.

    Raises:
        BrokenTurnError: nothing came to an end in so many seconds.
        httpx.HTTPStatusError: the server refuses the turn.
    """
    headers = {"Idempotency-Key": key or secrets.token_hex(16)}
    retrying = Retrying(
        retry=retry_if_exception_type((BrokenTurnError, httpx.TransportError)),
        stop=stop_after_delay(seconds),
        wait=wait_exponential_jitter(0.25, 10),
        reraise=True,
    )
    for attempt in retrying:
        with attempt:
            if attempt.retry_state.attempt_number > 1:
                yield BEGIN
            yield from once(client, path, body | {"stream": True}, headers)


def once(
    client: httpx.Client, path: str, body: dict[str, Any], headers: dict[str, str]
) -> Iterator[dict[str, Any]]:
    with client.stream("POST", path, json=body, headers=headers) as response:
        if response.is_server_error or "Retry-After" in response.headers:
            raise BrokenTurnError(response.read().decode(errors="replace"))
        if response.is_error:
            response.read()
            response.raise_for_status()
        whole = False
        # To its end, so that the connection can be used again.
        for line in response.iter_lines():
            whole = whole or line == "data: [DONE]"
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise BrokenTurnError(chunk["error"]["message"])
                yield chunk
    if not whole:
        raise BrokenTurnError("the answer ended without [DONE]")

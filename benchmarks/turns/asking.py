"""A turn as its client sees it, and a server of ours to take turns with."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks.harness import servers
from benchmarks.harness.cli import BenchmarkError
from benchmarks.harness.servers import Target
from vllm_sink.buffer import Buffer


class RefusedError(BenchmarkError):
    """What a server says to a request that it does not serve."""


@dataclass(frozen=True)
class Answer:
    first_ms: float
    """From the request to the first token."""
    prompt_tokens: int
    cached_tokens: int | None
    """Of the prompt, those that were not computed; None: the server does not say."""
    text: str


def client(target: Target) -> httpx.Client:
    """With a connection that stays open: making one is no part of a turn."""
    return httpx.Client(base_url=f"{target.url}/v1", timeout=servers.PATIENCE_SECONDS)


def ask(client: httpx.Client, path: str, **body: Any) -> Answer:
    """Raises:
    RefusedError: there is to be no answer.
    BenchmarkError: the server is lost.
    """
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    first: float | None = None
    texts: list[str] = []
    usage: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        with client.stream("POST", path, json=options | body) as response:
            if response.is_error:
                raise RefusedError(json.loads(response.read())["error"]["message"])
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RefusedError(chunk["error"]["message"])
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    # All of these servers say nothing before they have a token.
                    first = first or time.perf_counter()
                    texts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
    except httpx.HTTPError as error:
        raise BenchmarkError(f"The server at {client.base_url} was lost: {error}.") from error
    if first is None:
        raise BenchmarkError(f"The server at {client.base_url} gave no token.")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Answer(1000 * (first - start), usage["prompt_tokens"], cached, "".join(texts))


@contextmanager
def server(model: Path | str, buffer: Buffer, **settings: Any) -> Iterator[Target]:
    """Ours, with one stream at a time and its sessions in a file of its own if not elsewhere."""
    with TemporaryDirectory() as scratch:
        served = {
            "model": model,
            "served-model-name": "served",
            "host": "127.0.0.1",
            "block-size": servers.BLOCK,
            "max-num-seqs": 1,
            "session-store": f"sqlite:{scratch}/sessions.sqlite",
            **sizes(buffer),
            **settings,
        }

        def command(port: int) -> list[str]:
            return [*servers.OURS, "--enforce-eager", *servers.flags(served | {"port": port})]

        with servers.started(command) as target:
            yield target


def sizes(buffer: Buffer) -> dict[str, int]:
    """A server's flags."""
    return {
        "sink-tokens": buffer.sinks,
        "window-tokens": buffer.window,
        "compact-tokens": buffer.mark,
    }

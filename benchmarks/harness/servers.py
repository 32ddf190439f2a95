"""One server for each arm: how it is started, and whether it still answers.

Every server computes on one thread, so that HTTP and the clients have another core.
"""

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.harness import venvs
from benchmarks.harness.cli import BenchmarkError
from launch.server import ServerLostError, free_port, serving
from vllm_sink import embedded
from vllm_sink.geometry import Geometry

BLOCK = 32
"""Tokens of a KV block: the smallest of vLLM on a CPU, and so the least that a stream wastes."""
POOL_STREAMS = 16
"""The KV pool of every vLLM server holds so many streams with S sinks and a full window of W ..."""
TRAINED_CONTEXT = 8192
"""... or one of so many tokens, without which stock vLLM does not start."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
OURS = [sys.executable, "-m", "vllm_sink.serve"]
GPU_SHARE = 0.2
"""Of a GPU's memory: four servers of vLLM at a time."""
CAUSE = re.compile(r"^(?:\(.*\] )?((?:[\w.]+Error|.* error): .+)", re.MULTILINE)
"""As Python and argparse put it, behind vLLM's mark of process and place."""
PATIENCE_SECONDS = 600
"""For one answer: a prompt of thousands of tokens takes many seconds."""


@dataclass(frozen=True)
class Shape:
    """What all servers have in common."""

    model: Path
    dtype: str
    streams: int
    """Served at once."""
    geometry: Geometry

    @property
    def cache_tokens(self) -> int:
        return self.geometry.sinks + self.geometry.window

    @property
    def pool_blocks(self) -> int:
        null_block = 1
        streams = POOL_STREAMS * self.geometry.max_blocks(BLOCK)
        return max(streams, TRAINED_CONTEXT // BLOCK) + null_block


@dataclass(frozen=True)
class Arm:
    command: Callable[[Shape, int], list[str]]
    """To serve a shape on a port."""
    truncates: bool = False
    """Its clients keep their context to S + W tokens, and send all of it each time."""


def sink(shape: Shape, port: int) -> list[str]:
    sizes = {"sink-tokens": shape.geometry.sinks, "window-tokens": shape.geometry.window}
    return [*_ours(shape, port), *flags(sizes)]


def window(shape: Shape, port: int) -> list[str]:
    return [
        *_ours(shape, port),
        "--sink-policy=window",
        *flags({"window-tokens": shape.cache_tokens}),
    ]


def stock(shape: Shape, port: int) -> list[str]:
    # The command `vllm` fails where the distribution is called vllm-cpu.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_vllm(shape, port)]


def llamacpp(shape: Shape, port: int) -> list[str]:
    settings = {
        "model": embedded.gguf(),
        "port": port,
        "streams": shape.streams,
        "stream-tokens": shape.cache_tokens,
        "keep": shape.geometry.sinks,
    }
    script = str(venvs.GUESTS / "llamacpp_server.py")
    return [*venvs.isolated("llamacpp"), script, *flags(settings)]


def _ours(shape: Shape, port: int) -> list[str]:
    return [*OURS, "--session-store=none", *_vllm(shape, port)]


def _vllm(shape: Shape, port: int) -> list[str]:
    settings = {
        "model": shape.model,
        "served-model-name": shape.model.name,
        "dtype": shape.dtype,
        "block-size": BLOCK,
        "num-gpu-blocks-override": shape.pool_blocks,
        "max-num-seqs": shape.streams,
        "host": "127.0.0.1",
        "port": port,
    }
    if _on_gpu():
        settings["gpu-memory-utilization"] = GPU_SHARE
    return ["--enforce-eager", "--enable-prefix-caching", *flags(settings)]


def _on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


ARMS = {
    "sink": Arm(sink),
    "window": Arm(window),
    "dense": Arm(stock),
    "recompute": Arm(stock, truncates=True),
    "llamacpp": Arm(llamacpp),
}


@dataclass(frozen=True)
class Target:
    """A server that answers, whoever started it."""

    url: str
    model: str
    """As the server calls it."""
    process: psutil.Process | None = None
    """Where the benchmark started it."""

    def ask(self, prompt: str, output_tokens: int) -> httpx.Response:
        """Its answer to a completion, be it a refusal.

        Raises:
            BenchmarkError: there was none.
        """
        request = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
        }
        url = f"{self.url}/v1/completions"
        try:
            return httpx.post(url, json=request, timeout=PATIENCE_SECONDS)
        except httpx.HTTPError as error:
            raise BenchmarkError(f"The server at {self.url} no longer answers: {error}.") from error

    def check(self) -> None:
        """Raises:
        BenchmarkError: it does not generate.
        """
        answer = self.ask("Light", 1)
        if answer.is_error:
            raise BenchmarkError(f"The server at {self.url} cannot generate: {answer.text}.")

    def kv_blocks(self) -> int:
        """Of ours: blocks that requests hold."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        (held,) = (line for line in lines if line.startswith("vllm_sink:kv_blocks_held{"))
        return int(float(held.rpartition(" ")[2]))

    def memory_mib(self) -> float | None:
        """Of all its processes; pages that they share count once (PSS)."""
        if self.process is None:
            return None
        processes = [self.process, *self.process.children(recursive=True)]
        return round(sum(process.memory_full_info().pss for process in processes) / 2**20, 1)


def found(url: str, process: psutil.Process | None = None) -> Target:
    """The server at `url`, with the first model that it lists.

    Raises:
        BenchmarkError: there is none.
    """
    try:
        models = httpx.get(f"{url}/v1/models").raise_for_status().json()
        model = models["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
        raise BenchmarkError(f"No OpenAI-compatible server answers at {url}: {error}.") from error
    return Target(url, model, process)


def cause(log: str) -> str:
    """The first error that a log tells of, or its last line."""
    error = CAUSE.search(log)
    return error[1] if error else log.rstrip().rpartition("\n")[2]


@contextmanager
def running(name: str, shape: Shape) -> Iterator[Target]:
    """The server of arm `name`, until the context ends.

    Raises:
        BenchmarkError: it does not start.
    """
    with started(lambda port: ARMS[name].command(shape, port)) as target:
        yield target


@contextmanager
def started(
    command: Callable[[int], list[str]], variables: dict[str, str] | None = None
) -> Iterator[Target]:
    """The server of a command, given its port, until the context ends.

    Raises:
        BenchmarkError: it does not start.
    """
    port = free_port()
    chosen = [f"{key}={value}" for key, value in (ENVIRONMENT | (variables or {})).items()]
    with serving(["env", *chosen, *command(port)], port) as server:
        try:
            asyncio.run(server.ready())
        except ServerLostError as error:
            log = server.group.log.read_text(encoding="utf-8", errors="replace")
            raise BenchmarkError(f"The server did not start: {cause(log)}") from error
        yield found(server.url, psutil.Process(server.group.leader.pid))

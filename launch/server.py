"""A server that is started, waited for and stopped."""

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx

from launch import group
from launch.group import Group

REFRESH_SECONDS = 0.5


class ServerLostError(RuntimeError):
    """The server ended or stopped answering: one sentence, then the last lines of its log."""


@dataclass(frozen=True)
class Server:
    group: Group
    url: str

    async def ready(self) -> None:
        async with httpx.AsyncClient(base_url=self.url) as client:
            while True:
                if self.group.leader.poll() is not None:
                    raise self.lost()
                with suppress(httpx.TransportError):
                    if (await client.get("/health")).is_success:
                        return
                await asyncio.sleep(REFRESH_SECONDS)

    def lost(self, cause: Exception | None = None) -> ServerLostError:
        leader, log = self.group.leader, self.group.log
        with suppress(subprocess.TimeoutExpired):  # its connections break before it has ended
            leader.wait(REFRESH_SECONDS)
        ending = leader.poll()
        how = f"failed ({cause})" if ending is None else f"ended with exit code {ending}"
        last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        return ServerLostError(f"The server {how}; the last lines of its log are:\n{last_lines}")


@contextmanager
def serving(command: list[str], port: int) -> Iterator[Server]:
    # One GiB holds tens of thousands of this model's tokens; vLLM would take what the machine has.
    with group.running(command, {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}) as started:
        yield Server(started, f"http://127.0.0.1:{port}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port

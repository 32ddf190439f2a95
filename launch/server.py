"""A server in a process group of its own, which is stopped with all its children."""

import asyncio
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

GRACE_SECONDS = 10
REFRESH_SECONDS = 0.5


class ServerLostError(RuntimeError):
    """The server ended or stopped answering: one sentence, then the last lines of its log."""


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    async def ready(self) -> None:
        async with httpx.AsyncClient(base_url=self.url) as client:
            while True:
                if self.process.poll() is not None:
                    raise self.lost()
                with suppress(httpx.TransportError):
                    if (await client.get("/health")).is_success:
                        return
                await asyncio.sleep(REFRESH_SECONDS)

    def lost(self, cause: Exception | None = None) -> ServerLostError:
        with suppress(subprocess.TimeoutExpired):  # its connections break before it has ended
            self.process.wait(REFRESH_SECONDS)
        ending = self.process.poll()
        how = f"failed ({cause})" if ending is None else f"ended with exit code {ending}"
        last_lines = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return ServerLostError(f"The server {how}; the last lines of its log are:\n{last_lines}")

    def stop(self) -> None:
        """Ask the whole group to end, then kill what is left of it. Not interruptible."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def serving(command: list[str], port: int) -> Iterator[Server]:
    # One GiB holds tens of thousands of this model's tokens; vLLM would take what the machine has.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with tempfile.NamedTemporaryFile(prefix="vllm-sink-", suffix=".log") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = Server(process, f"http://127.0.0.1:{port}", Path(log.name))
        try:
            yield server
        finally:
            server.stop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port

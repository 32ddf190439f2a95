"""A Redis of one's own, for as long as it is needed.

    python -m benchmarks.harness.redis

fetches it: Debian packages of 1.3 MB, unpacked into ~/.cache/vllm_sink and not installed.
"""

import os
import socket
import subprocess
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.harness import cli, debian
from launch.server import free_port

PACKAGES = ("redis-server", "redis-tools", "libatomic1", "libjemalloc2", "liblzf1")
PATIENCE_SECONDS = 20


def start(folder: Path, port: int, *arguments: str) -> "subprocess.Popen[bytes]":
    """Redis on a port of this machine, its data in `folder` and on disk before it answers a write.

    It listens a moment later.

    Raises:
        BenchmarkError: it has not been fetched.
    """
    usr = debian.folder("redis") / "usr"
    if not usr.exists():
        raise cli.BenchmarkError("Redis is missing: run `python -m benchmarks.harness.redis`.")
    settings = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    settings += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", *arguments]
    libraries = os.pathsep.join(str(library) for library in usr.glob("lib/*-linux-*"))
    with (folder / "redis.log").open("ab") as log:
        return subprocess.Popen(
            [usr / "bin" / "redis-server", *settings],
            env=os.environ | {"LD_LIBRARY_PATH": libraries},
            stdout=log,
            stderr=log,
        )


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[str]:
    """The address of Redis that answers, until the context ends.

    Raises:
        BenchmarkError: it does not come to answer, or has not been fetched.
    """
    port = free_port()
    process = start(folder, port, *arguments)
    try:
        end = time.monotonic() + PATIENCE_SECONDS
        while not answers(port):
            if process.poll() is not None or time.monotonic() > end:
                raise cli.BenchmarkError((folder / "redis.log").read_text("utf-8").rstrip())
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def fetch() -> None:
    """Raises BenchmarkError where apt-get or dpkg fail; their own words are on stderr."""
    debian.fetch("redis", *PACKAGES)


def main() -> None:
    ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    fetch()
    print(debian.folder("redis"))


if __name__ == "__main__":
    cli.run(main)

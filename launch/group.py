"""A command in a process group of its own, which is stopped with all its children."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 10


@dataclass(frozen=True)
class Group:
    leader: subprocess.Popen[bytes]
    log: Path
    """What all of them write."""
    grace_seconds: float

    def kill(self) -> None:
        """As a machine does that loses power."""
        os.killpg(self.leader.pid, signal.SIGKILL)
        self.leader.wait()

    def stop(self) -> None:
        """Ask the whole group to end, then kill what is left of it. Not interruptible."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        with suppress(ProcessLookupError):
            os.killpg(self.leader.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.leader.wait(self.grace_seconds)
            os.killpg(self.leader.pid, signal.SIGKILL)
        self.leader.wait()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def running(command: list[str], environment: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """With a log that is gone when they are."""
    with (
        tempfile.NamedTemporaryFile(prefix="vllm-sink-", suffix=".log") as log,
        logged(Path(log.name), command, environment) as group,
    ):
        yield group


@contextmanager
def logged(
    log: Path,
    command: list[str],
    environment: Mapping[str, str] = os.environ,
    grace_seconds: float = GRACE_SECONDS,
) -> Iterator[Group]:
    with log.open("wb") as output:
        leader = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    group = Group(leader, log, grace_seconds)
    try:
        yield group
    finally:
        group.stop()

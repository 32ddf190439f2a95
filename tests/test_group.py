import signal
import sys
import time

import psutil

from launch import group


def test_a_group_takes_its_children_along() -> None:
    stubborn = ["sh", "-c", "trap '' TERM; echo $$; sleep 60"]
    parent = [sys.executable, "-c", f"import subprocess; subprocess.run({stubborn})"]
    with group.running(parent) as started:
        while not started.log.read_text():
            time.sleep(0.05)
        children = psutil.Process(started.leader.pid).children(recursive=True)
    assert started.leader.returncode == -signal.SIGTERM
    assert children
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive

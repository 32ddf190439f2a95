import signal
import sys
import time

import psutil

from launch.server import serving


def test_a_server_takes_its_children_along() -> None:
    stubborn = ["sh", "-c", "trap '' TERM; echo $$; sleep 60"]
    with serving(
        [sys.executable, "-c", f"import subprocess; subprocess.run({stubborn})"], 0
    ) as server:
        while not server.log.read_text():
            time.sleep(0.05)
        children = psutil.Process(server.process.pid).children(recursive=True)
    assert server.process.returncode == -signal.SIGTERM
    assert children
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive

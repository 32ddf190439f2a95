import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from benchmarks.harness import servers, venvs
from benchmarks.harness.cli import BenchmarkError
from benchmarks.harness.servers import ARMS, Arm, Shape, Target, cause, found, running
from launch.server import free_port
from vllm_sink.geometry import Geometry

SHAPE = Shape(Path("model"), "float32", streams=8, geometry=Geometry(sinks=4, window=508))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venvs, "python", Path)


class Refusing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(400, "too long")


@pytest.fixture
def refusing() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("arm", ARMS)
def test_servers_differ_in_what_is_compared_alone(arm: str) -> None:
    command = " ".join(ARMS[arm].command(SHAPE, 8123))
    assert "--port=8123" in command
    if arm == "llamacpp":
        assert "--streams=8 --stream-tokens=512 --keep=4" in command
        return
    assert "--num-gpu-blocks-override=289 --max-num-seqs=8" in command
    expected = {"sink": "--sink-tokens=4 --window-tokens=508", "window": "--window-tokens=512"}
    assert command.endswith(expected.get(arm, "--port=8123"))


def test_servers_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_on_gpu", lambda: True)
    for arm in set(ARMS) - {"llamacpp"}:
        assert "--gpu-memory-utilization=0.2" in ARMS[arm].command(SHAPE, 8123)


def test_only_a_client_that_recomputes_truncates() -> None:
    assert [name for name, arm in ARMS.items() if arm.truncates] == ["recompute"]


def test_a_small_window_leaves_room_for_a_stream_of_stock_vllm() -> None:
    small = Shape(Path("model"), "float32", 1, Geometry(sinks=4, window=60))
    assert small.pool_blocks * servers.BLOCK > servers.TRAINED_CONTEXT


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "(EngineCore pid=1) INFO 01-01 [a.py:1] started\n"
            "(EngineCore pid=1) ERROR 01-01 [a.py:2] ValueError: too small\n"
            "RuntimeError: Engine core initialization failed.\n",
            "ValueError: too small",
        ),
        ("serve: error: sink.window_tokens=0: too small\n", "serve: error: sink.window_tokens=0"),
        ("one\nsegmentation fault\n", "segmentation fault"),
    ],
)
def test_the_first_error_of_a_log_is_the_cause(log: str, expected: str) -> None:
    assert cause(log).startswith(expected)


def test_a_server_that_does_not_start_is_told_with_its_cause_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [sys.executable, "-c", "raise ValueError('no such model')"]
    monkeypatch.setitem(ARMS, "sink", Arm(lambda shape, port: command))
    before = psutil.Process().children()
    with (
        pytest.raises(BenchmarkError, match="did not start: ValueError: no such model"),
        running("sink", SHAPE),
    ):
        pass
    assert psutil.Process().children() == before


def test_a_url_where_nobody_listens_is_told() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(BenchmarkError, match=f"No OpenAI-compatible server answers at {url}"):
        found(url)


def test_a_refusal_is_an_answer_and_yet_no_server_to_measure(refusing: str) -> None:
    target = Target(refusing, "model")
    assert target.ask("Light", 1).status_code == 400
    with pytest.raises(BenchmarkError, match="cannot generate"):
        target.check()


def test_a_server_that_is_gone_is_told() -> None:
    with pytest.raises(BenchmarkError, match="no longer answers"):
        Target(f"http://127.0.0.1:{free_port()}", "model").check()


def test_memory_is_known_of_servers_that_were_started_here() -> None:
    assert Target("", "model").memory_mib() is None
    assert (Target("", "model", psutil.Process()).memory_mib() or 0) > 0

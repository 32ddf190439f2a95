"""Settings that cannot work: one sentence, soon, and nothing left behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cluster import read
from launch.replica import engine_of
from launch.server import free_port
from tests.server.conftest import llama
from vllm_sink.settings import SettingsError

SMALL = {"cpus": 0.1, "worker": {"CPU": 0.1}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(llama(tmp_path_factory.mktemp("model") / "tiny"))


def refusal(folder: Path, args: dict[str, Any]) -> str:
    config = folder / "serve.yaml"
    application = {"name": "a", "import_path": "launch.app:build", "args": args}
    config.write_text(yaml.safe_dump({"applications": [application]}))
    command = [sys.executable, "-m", "launch.local", str(config), f"--port={free_port()}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr
    return ended.stderr.splitlines()[-1].removeprefix("python -m launch.local: error: ")


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.local", str(tmp_path / "none.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith(f"No such file or directory: '{command[-1]}'")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"applications: []", "it has 0 applications; accepted is one"),
        (b"# caf\xe9", "can't decode byte 0xe9 in position 5"),
        (b"[" * 5000, "maximum recursion depth exceeded"),
    ],
)
def test_a_config_of_something_else(tmp_path: Path, content: bytes, sentence: str) -> None:
    config = tmp_path / "some.yaml"
    config.write_bytes(content)
    with pytest.raises(SettingsError, match=sentence) as refused:
        read(config)
    assert str(refused.value).startswith(f"{config}: ")
    assert "\n" not in str(refused.value)


def test_ray_is_not_installed(tmp_path: Path) -> None:
    script = "import sys; sys.modules['ray'] = None; from launch.local import main; main()"
    config = tmp_path / "serve.yaml"
    config.write_text("{}")
    command = [sys.executable, "-c", script, str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert "pip install 'vllm-sink[ray]'" in ended.stderr.splitlines()[-1]


@pytest.mark.slow
def test_too_few_resources(tmp_path: Path, model: str) -> None:
    args = {"flags": {"model": model}, "replicas": 3, "worker": {"GPU": 8}}
    said = refusal(tmp_path, args)
    assert said.startswith("replicas=3: they need 24 GPU with the ingress, this machine has ")


@pytest.mark.slow
def test_a_store_that_does_not_answer(tmp_path: Path, model: str) -> None:
    store = f"redis://127.0.0.1:{free_port()}"
    args = {"flags": {"model": model, "session-store": store}, **SMALL}
    assert refusal(tmp_path, args).startswith("session_store: ")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model=/none/such"], "/none/such"),
        (["--window-tokens=1000"], "window_tokens"),
    ],
)
def test_what_a_replica_finds_out(model: str, flags: list[str], sentence: str) -> None:
    """It is told as the store is, above."""
    with pytest.raises(SettingsError, match=sentence) as refused:
        engine_of([f"--model={model}", *flags])
    assert "\n" not in str(refused.value)

"""A tiny checkpoint to serve, real servers of it, and the environment of a fresh process."""

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from launch.server import free_port
from vllm_sink import embedded

CONTEXT = 256
NO_TLS = False
"""For httpx's `verify`: reading the certificates of all authorities takes 30 ms a request."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("served") / "tiny", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose greedy answers do not repeat themselves."""
    return llama(tmp_path_factory.mktemp("speaker") / "tiny", initializer_range=0.3)


def llama(path: Path, **changes: Any) -> Path:
    """A random Llama of a few million weights, with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        **changes,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(speaker: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(speaker)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a fresh process, and put back: what other tests set, and what the command line sets."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("PYTHONWARNINGS", "")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    # Set before it is taken away, so that it is taken away again after a test that sets it.
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    yield
    logging.disable(logging.NOTSET)


@dataclass
class Server:
    process: psutil.Popen
    url: str
    log: Path

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", verify=NO_TLS).text
        return sum(float(v) for v in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE))

    def request(self, **body: Any) -> dict[str, Any]:
        defaults = {"ignore_eos": True, "temperature": 0.0}
        asked = {"url": f"{self.url}/v1/completions", "json": defaults | body}
        return asked | {"timeout": 240, "verify": NO_TLS}


@contextmanager
def started(command: list[str], folder: Path, multiprocessing: bool = True) -> Iterator[Server]:
    """A server that answers, on a port of its own and with a log in `folder`, until the end."""
    log, port = folder / "server.log", free_port()
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing))}
    with log.open("w") as out:
        process = psutil.Popen(
            [*command, f"--port={port}", "--host=127.0.0.1"],
            env=os.environ | {"XDG_STATE_HOME": str(folder)} | variables,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    running = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_for(lambda: process.poll() is not None or is_up(running.url), timeout=240)
        assert process.poll() is None, log.read_text()[-4000:]
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", verify=NO_TLS).status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition: Any, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)

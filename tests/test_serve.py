"""The server's command line on a tiny checkpoint, and one real server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_sink import embedded, serve
from vllm_sink.serve import STREAM_CAPACITY, fill_in_defaults, main, make_parser
from vllm_sink.settings import SettingsError

CONTEXT = 256
SINKS, WINDOW, CAPACITY = 4, 60, 1024
MODULE = [sys.executable, "-m", "vllm_sink.serve"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 3 million weights, with the embedded model's tokenizer."""
    path = tmp_path_factory.mktemp("served") / "tiny"
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
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process, and put back: what other tests set, and what the command line sets."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)


def completed(*flags: object) -> Namespace:
    args = make_parser().parse_args([str(flag) for flag in flags])
    fill_in_defaults(args)
    return args


def test_defaults(model: Path) -> None:
    args = completed("--model", model, "--max-num-seqs", 4)
    assert args.additional_config["sink"] == {
        "policy": "sink",
        "sink_tokens": SINKS,
        "window_tokens": CONTEXT - SINKS,
        "reindex": True,
    }
    assert args.max_model_len == STREAM_CAPACITY == 4_194_304
    assert args.kv_cache_memory_bytes > 0


def test_without_a_model_the_embedded_one_is_served() -> None:
    args = completed("--max-num-seqs", 4)
    assert args.model == args.model_tag == str(embedded.path())
    assert args.served_model_name == ["smollm2-135m-instruct"]
    assert args.additional_config["sink"]["window_tokens"] == 2048 - SINKS


def test_capacity_is_what_memory_holds(model: Path) -> None:
    """A hundred thousand streams of it would not fit any machine this runs on."""
    args = completed("--model", model, "--max-num-seqs", 100_000, "--max-num-batched-tokens", 10**5)
    assert CONTEXT <= args.max_model_len < STREAM_CAPACITY


def test_flags_override_additional_config(model: Path) -> None:
    given = {"sink": {"sink_tokens": 8, "window_tokens": 32, "reindex": False}, "other": 1}
    flags = ["--model", model, "--additional-config", json.dumps(given), "--window-tokens", 64]
    args = completed(*flags, "--max-model-len", 2000)
    assert args.additional_config == {
        "sink": {"policy": "sink", "sink_tokens": 8, "window_tokens": 64, "reindex": False},
        "other": 1,
    }
    assert args.max_model_len == 2000


@pytest.mark.parametrize(
    ("capability", "asked", "expected"),
    [
        ("AVX2", [], "float32"),
        ("AVX2", ["--dtype", "bfloat16"], "bfloat16"),
        ("AVX512", [], "auto"),
    ],
)
def test_no_bfloat16_on_a_cpu_that_is_slow_in_it(
    model: Path,
    capability: str,
    asked: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert completed("--model", model, *asked).dtype == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], "CUSTOM"),
        (["--sink-policy", "window"], "CUSTOM"),
        (["--sink-policy", "full"], None),
        (["--attention-backend", "FLASH_ATTN"], "FLASH_ATTN"),
        (["--attention-config", '{"backend": "FLASH_ATTN"}'], None),
        (["--attention-config", '{"backend_per_kind": {"full_attention": "CUSTOM"}}'], None),
        (
            ["--attention-config", '{"backend_per_kind": {"sliding_window": "FLASH_ATTN"}}'],
            "CUSTOM",
        ),
    ],
    ids=str,
)
def test_a_gpu_is_served_with_our_backend_unless_told(
    model: Path, asked: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completed("--model", model, *asked).attention_backend in (None, "FLASH_ATTN")
    monkeypatch.setattr(serve, "current_platform", gpu_of(80 * 2**30))
    args = completed("--model", model, *asked)
    assert args.attention_backend == expected
    assert args.kv_cache_memory_bytes is None


def gpu_of(memory_bytes: int) -> SimpleNamespace:
    return SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        get_device_total_memory=lambda: memory_bytes,
    )


@pytest.mark.parametrize(
    ("memory_gib", "block_size", "expected"),
    [(80, [], STREAM_CAPACITY), (8, [], 2**20), (8, ["--block-size", 32], 2**21)],
)
def test_capacity_is_what_block_tables_of_a_gpu_hold(
    model: Path,
    memory_gib: int,
    block_size: list[object],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """8 bytes a block of each of 256 streams, in one part of 64: 8 GiB have room for 65,536."""
    monkeypatch.setattr(serve, "current_platform", gpu_of(memory_gib * 2**30))
    monkeypatch.setattr(serve, "ROWS_SHARE", 1)
    args = completed("--model", model, "--max-num-seqs", 256, *block_size)
    assert args.max_model_len == expected


def test_window_policy_has_the_whole_cache(model: Path) -> None:
    args = completed("--model", model, "--sink-policy", "window")
    assert args.additional_config["sink"]["window_tokens"] == CONTEXT


@pytest.mark.parametrize("sink", [5, "abc", None, [1]], ids=repr)
def test_a_sink_entry_of_another_type_is_refused(model: Path, sink: Any) -> None:
    with pytest.raises(SettingsError, match=rf"^sink={re.escape(repr(sink))}: "):
        completed("--model", model, "--additional-config", json.dumps({"sink": sink}))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--sink-tokens", "-1"], r"error: sink\.sink_tokens=-1: .* greater than or equal to 0$"),
        (["--window-tokens", "0"], r"error: sink\.window_tokens=0: .* than or equal to 1$"),
        (
            ["--window-tokens", "4096"],
            rf"error: sink\.sink_tokens \+ sink\.window_tokens=4100: accepted up to {CONTEXT}, .*$",
        ),
        (["--kv-cache-dtype", "fp8"], r"error: kv_cache_dtype=fp8: .*; accepted is auto$"),
        (["--sink-policy", "other"], r"error: argument --sink-policy: invalid choice: 'other' .*$"),
        (["--sink-tokens", "four"], r"error: argument --sink-tokens: invalid int value: 'four'$"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flags_end_with_one_sentence(
    model: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--model", str(model), *flags])
    assert exit_.value.code == 2
    assert re.search(sentence, capsys.readouterr().err.splitlines()[-1])


def test_help_shows_the_flags_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help=Sinks"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "Which tokens a stream keeps." in text
    for flag in ("--sink-tokens", "--window-tokens", "--sink-policy"):
        assert flag in text


@pytest.mark.slow
def test_a_refused_process_leaves_nothing(model: Path) -> None:
    process = psutil.Popen(
        [*MODULE, "--model", str(model), "--sink-tokens", "300"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("python -m vllm_sink.serve: error: sink.")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@dataclass
class Server:
    process: psutil.Popen
    url: str
    log: Path

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(v) for v in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE))

    def request(self, **body: Any) -> dict[str, Any]:
        defaults = {"model": "tiny", "ignore_eos": True, "temperature": 0.0}
        return {"url": f"{self.url}/v1/completions", "json": defaults | body, "timeout": 240}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {
        "model": model,
        "served-model-name": "tiny",
        "host": "127.0.0.1",
        "port": port,
        "sink-tokens": SINKS,
        "window-tokens": WINDOW,
        "max-model-len": CAPACITY,
        "max-num-seqs": 4,
        "block-size": 32,
        "kv-cache-memory-bytes": 2**26,
    }
    arguments = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        process = psutil.Popen(
            [*MODULE, *arguments, "--enforce-eager"],
            env=environment,
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
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition: Any, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)


@pytest.mark.slow
def test_the_log_sums_up_what_is_served(server: Server) -> None:
    """ceil(4/32) + ceil(59/32) + 1 = 4 blocks a stream."""
    summary = re.search(
        r"Sinks S=4, window W=60 tokens, blocks of 32: a stream holds at most 4 blocks .*; "
        r"KV pool of (\d+) blocks: (\d+) full streams fit, for this group of layers\.",
        server.log.read_text(),
    )
    assert summary
    assert int(summary[2]) == int(summary[1]) // 4


@pytest.mark.slow
def test_a_stream_passes_its_window_and_the_trained_context(server: Server) -> None:
    tokens = CONTEXT + 3 * WINDOW
    body = {"prompt": [1] * 20, "max_tokens": tokens, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    with httpx.stream("POST", **server.request(**body, **usage)) as response:
        assert response.status_code == 200
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data.pop() == "[DONE]"
    chunks = [json.loads(line) for line in data]
    assert len(chunks) > tokens // 2
    assert chunks[-1]["usage"]["completion_tokens"] == tokens


@pytest.mark.slow
def test_a_prompt_over_the_capacity_is_a_bad_request(server: Server) -> None:
    response = httpx.post(**server.request(prompt=[1] * (CAPACITY + 1), max_tokens=1))
    assert response.status_code == 400
    assert str(CAPACITY) in response.json()["error"]["message"]


@pytest.mark.slow
def test_a_client_that_hangs_up_gives_its_blocks_back(server: Server) -> None:
    body = {"prompt": [1] * 100, "max_tokens": CAPACITY - 100, "stream": True}
    with httpx.stream("POST", **server.request(**body)) as response:
        lines = response.iter_lines()
        while not next(lines).startswith("data: "):
            pass
        assert server.metric("vllm:num_requests_running") == 1
        assert server.metric("vllm:kv_cache_usage_perc") > 0
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, timeout=30)
    wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, timeout=30)


@pytest.mark.slow
def test_sigterm_ends_every_process(server: Server) -> None:
    """Last: it takes the server down."""
    processes = [server.process, *server.process.children(recursive=True)]
    assert len(processes) > 1
    server.process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []

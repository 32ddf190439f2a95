"""The server's command line on a tiny checkpoint, and one real server."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from transformers import GPTNeoXConfig

from vllm_sink.serve import main

from .conftest import CONTEXT, Server, started, wait_for

SINKS, WINDOW, LENGTH = 4, 60, 1024
MODULE = [sys.executable, "-m", "vllm_sink.serve"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--sink-tokens", "-1"], r"error: sink\.sink_tokens=-1: .* greater than or equal to 0$"),
        (["--window-tokens", "0"], r"error: sink\.window_tokens=0: .* than or equal to 1$"),
        (
            ["--window-tokens", "4096"],
            rf"error: sink\.sink_tokens \+ sink\.window_tokens=4100: accepted up to {CONTEXT}, .*$",
        ),
        (["--compact-tokens", "9"], r"error: sink\.compact_tokens=9: accepted from 257 on, .*$"),
        (
            ["--compact-tokens", "999", "--max-model-len", "600"],
            r"error: sink\.compact_tokens=999: accepted up to max_model_len=600, .*$",
        ),
        (["--kv-cache-dtype", "fp8"], r"error: kv_cache_dtype=fp8: .*; accepted is auto$"),
        (["--sink-policy", "other"], r"error: argument --sink-policy: invalid choice: 'other' .*$"),
        (["--default-max-tokens", "-1"], r"error: argument --default-max-tokens: -1: accepted .*$"),
        (["--session-limit", "0"], r"error: argument --session-limit: 0: accepted .* from 1 on$"),
        (
            ["--session-store", "mysql:x"],
            r"error: --session-store is 'mysql:x'; accepted are sqlite:PATH, redis://.*$",
        ),
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
    for flag in ("--sink-tokens", "--window-tokens", "--compact-tokens", "--sink-policy"):
        assert flag in text


def group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def refused(*flags: object, **variables: str) -> str:
    """The last line of a server that ends at its start; it leaves no process and no trace."""
    process = psutil.Popen(
        [*MODULE, *map(str, flags)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    wait_for(lambda: not group_lives(process.pid), timeout=10)
    last: str = output.splitlines()[-1]
    return last.removeprefix("python -m vllm_sink.serve: error: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "variables", "sentence"),
    [
        (["--sink-tokens", 300], {}, r"sink\.sink_tokens=300: "),
        (["--window-tokens", 60], {"VLLM_PLUGINS": ""}, r"VLLM_PLUGINS='': leaves out "),
    ],
    ids=str,
)
def test_a_refused_process_leaves_nothing(
    model: Path, flags: list[object], variables: dict[str, str], sentence: str
) -> None:
    assert re.match(sentence, refused("--model", model, *flags, **variables))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_worker_finds_out_is_the_last_line(tmp_path: Path, ranks: int) -> None:
    """What its layers do with positions is seen of a loaded model, and not before."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = GPTNeoXConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=128,
        max_position_embeddings=CONTEXT,
        rope_parameters=rope | {"partial_rotary_factor": 1.0},
    )
    config.architectures = ["GPTNeoXForCausalLM"]
    config.save_pretrained(tmp_path)
    flags = ["--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager"]
    sentence = refused("--model", tmp_path, "--kv-cache-memory-bytes", 2**26, "-dp", ranks, *flags)
    assert re.match(
        r"model='.*': its layer \S+ changes queries or keys by position in .*; accepted ", sentence
    )


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = {
        "model": model,
        "served-model-name": "tiny",
        "sink-tokens": SINKS,
        "window-tokens": WINDOW,
        "max-model-len": LENGTH,
        "max-num-seqs": 4,
        "block-size": 32,
        "kv-cache-memory-bytes": 2**26,
    }
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    with started(
        [*MODULE, *arguments, "--enforce-eager"], tmp_path_factory.mktemp("log")
    ) as running:
        yield running


@pytest.mark.slow
def test_the_log_sums_up_what_is_served(server: Server) -> None:
    """ceil(4/32) + ceil(59/32) + 1 = 4 blocks a stream."""
    summary = re.search(
        r"Sinks S=4, window W=60 tokens, blocks of 32: a stream holds at most 4 blocks .*; "
        r"KV pool of (\d+) blocks: (\d+) full streams fit; compacted every 960 tokens\.",
        server.log.read_text(),
    )
    assert summary
    assert int(summary[2]) == int(summary[1]) // 4


@pytest.mark.slow
def test_the_log_tells_nothing_else(server: Server) -> None:
    """No other capacity, and no warning of a length that nobody set."""
    log = server.log.read_text()
    assert "KV cache size" not in log
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in log


@pytest.mark.slow
def test_a_stream_passes_its_window_and_the_trained_context(server: Server) -> None:
    tokens = CONTEXT + 3 * WINDOW
    body = {"prompt": [1] * 20, "max_tokens": tokens, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    with httpx.stream("POST", **server.request(model="tiny", **body, **usage)) as response:
        assert response.status_code == 200
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data.pop() == "[DONE]"
    chunks = [json.loads(line) for line in data]
    assert len(chunks) > tokens // 2
    assert chunks[-1]["usage"]["completion_tokens"] == tokens


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "tokens"), [(None, CONTEXT), (9, 9), (CONTEXT + 9, CONTEXT + 9)])
def test_a_chat_ends_where_it_says_or_at_the_default(
    server: Server, asked: int | None, tokens: int
) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Go on."}],
        "max_completion_tokens": asked,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=240).json()
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow
def test_a_prompt_over_the_length_is_a_bad_request(server: Server) -> None:
    response = httpx.post(**server.request(model="tiny", prompt=[1] * (LENGTH + 1), max_tokens=1))
    assert response.status_code == 400
    assert str(LENGTH) in response.json()["error"]["message"]


@pytest.mark.slow
def test_a_client_that_hangs_up_gives_its_blocks_back(server: Server) -> None:
    body = {"prompt": [1] * 100, "max_tokens": LENGTH - 100, "stream": True}
    with httpx.stream("POST", **server.request(model="tiny", **body)) as response:
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

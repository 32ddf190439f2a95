"""Streams through the OpenAI server, several times as long as `max_model_len`."""

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from vllm_sink.buffer import Buffer

from .conftest import CONTEXT, Server, started, wait_for

pytestmark = pytest.mark.slow

BUFFER = Buffer(4, 60, 200)
TOKENS = 3 * CONTEXT + 50
PROMPT = list(range(1000, 1030))
FIRST = BUFFER.mark - len(PROMPT)
"""Tokens of an answer as its stream is compacted first."""


def serving(model: Path, folder: Path, *flags: str) -> Any:
    settings = {
        "model": model,
        "served-model-name": "tiny",
        "dtype": "float32",
        "sink-tokens": BUFFER.sinks,
        "window-tokens": BUFFER.window,
        "compact-tokens": BUFFER.mark,
        "max-model-len": CONTEXT,
        "max-num-seqs": 8,
        "block-size": 32,
        "kv-cache-memory-bytes": 2**26,
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "vllm_sink.serve", "--enforce-eager", *arguments, *flags]
    return started(command, folder)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, tmp_path_factory.mktemp("log")) as running:
        yield running


def ask(server: Server, **body: Any) -> dict[str, Any]:
    defaults = {"model": "tiny", "prompt": PROMPT, "max_tokens": TOKENS, "return_token_ids": True}
    answer = httpx.post(**server.request(**(defaults | body)))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def streamed(server: Server, path: str = "completions", **body: Any) -> list[dict[str, Any]]:
    defaults = {"model": "tiny", "max_tokens": TOKENS, "return_token_ids": True, "stream": True}
    if path == "completions":
        defaults["prompt"] = PROMPT
    request = server.request(**(defaults | {"stream_options": {"include_usage": True}} | body))
    url = f"{server.url}/v1/{path}"
    with httpx.stream("POST", **(request | {"url": url})) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_tokens_are_those_of_a_client_that_compacts_its_own_buffer(server: Server) -> None:
    whole = ask(server)
    held, by_hand = list(PROMPT), []
    while len(by_hand) < TOKENS:
        part = ask(server, prompt=held, max_tokens=BUFFER.mark - len(held))
        by_hand += part["choices"][0]["token_ids"]
        held = BUFFER.compact(held + part["choices"][0]["token_ids"])
    (choice,) = whole["choices"]
    assert choice["token_ids"] == by_hand[:TOKENS]
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == TOKENS
    assert whole["usage"]["prompt_tokens"] == len(PROMPT)
    chunks = streamed(server)
    assert "".join(c["text"] for e in chunks for c in e["choices"]) == choice["text"]
    assert [t for e in chunks for c in e["choices"] for t in c["token_ids"]] == by_hand[:TOKENS]
    assert chunks[-1]["usage"]["completion_tokens"] == TOKENS


def test_a_stop_string_may_begin_before_a_compaction_and_end_behind_it(server: Server) -> None:
    varied = {"temperature": 1.0, "seed": 5}
    (whole,) = ask(server, **varied)["choices"]
    text = whole["text"]
    before = len(ask(server, max_tokens=FIRST, **varied)["choices"][0]["text"])
    stop = text[before - 4 : before + 4]
    assert text.find(stop) == before - 4
    (choice,) = ask(server, stop=[stop], **varied)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: before - 4], "stop")
    assert choice["stop_reason"] == stop
    assert FIRST < len(choice["token_ids"]) < len(whole["token_ids"])
    chunks = streamed(server, stop=[stop], **varied)
    assert "".join(c["text"] for e in chunks for c in e["choices"]) == text[: before - 4]


def test_log_probabilities_and_several_answers_go_on(server: Server) -> None:
    varied = {"temperature": 1.0, "seed": 6, "n": 3, "logprobs": 1}
    whole = ask(server, **varied)["choices"]
    texts = ["", "", ""]
    logprobs: list[list[float]] = [[], [], []]
    for event in streamed(server, **varied):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["logprobs"]:
                logprobs[choice["index"]] += choice["logprobs"]["token_logprobs"]
    assert [choice["text"] for choice in whole] == texts
    assert len(set(texts)) == 3
    for choice, seen in zip(whole, logprobs, strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(seen, abs=1e-4)
        assert len(seen) == TOKENS


def test_a_chat_goes_on_and_says_what_it_says_without_streaming(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Go on."}]}
    url = {"url": f"{server.url}/v1/chat/completions"}
    request = server.request(model="tiny", max_tokens=TOKENS, **body)
    whole = httpx.post(**(request | url)).json()
    chunks = streamed(server, "chat/completions", **body)
    said = [c["delta"].get("content") or "" for e in chunks for c in e["choices"]]
    assert "".join(said) == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] == TOKENS
    assert chunks[-1]["usage"]["completion_tokens"] == TOKENS


def test_a_grammar_s_state_goes_on(server: Server) -> None:
    pattern = r"([0-9] ){300}x"
    (choice,) = ask(server, structured_outputs={"regex": pattern}, ignore_eos=False)["choices"]
    assert re.fullmatch(pattern, choice["text"])
    assert len(choice["token_ids"]) > BUFFER.mark


def test_millions_may_be_asked_for_and_a_client_may_hang_up(server: Server) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5_000_000, "stream": True}
    with httpx.stream("POST", **server.request(**body)) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        for _ in range(2 * TOKENS):
            next(lines)
        assert server.metric("vllm:num_requests_running") == 1
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, timeout=30)
    wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, timeout=30)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"bad_words": ["a phrase of words"]}, r"bad_words=\['a phrase of words'\]: not kept by "),
        ({"prompt": [1] * CONTEXT}, rf"The decoder prompt \(length {CONTEXT}\) plus "),
    ],
    ids=str,
)
def test_what_a_stream_cannot_keep_is_a_bad_request(
    server: Server, body: dict[str, Any], sentence: str
) -> None:
    defaults = {"model": "tiny", "prompt": PROMPT, "max_tokens": TOKENS}
    answer = httpx.post(**server.request(**(defaults | body)))
    assert answer.status_code == 400
    assert re.match(sentence, answer.json()["error"]["message"])


def test_it_is_kept_where_a_stream_ends_before(server: Server) -> None:
    body = {"bad_words": ["a phrase of words"], "max_tokens": FIRST}
    assert ask(server, **body)["usage"]["completion_tokens"] == FIRST


def test_two_engines_give_the_same_tokens(
    server: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has half of eight streams at once."""
    prompts = [[n, *PROMPT] for n in range(8)]
    expected = [ask(server, prompt=prompt)["choices"][0]["token_ids"] for prompt in prompts]
    # Without it, vLLM 0.32 binds both engines to the same cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with (
        serving(model, tmp_path, "--data-parallel-size=2") as two,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        answers = pool.map(lambda prompt: ask(two, prompt=prompt), prompts)
        assert [answer["choices"][0]["token_ids"] for answer in answers] == expected
        served = httpx.get(f"{two.url}/metrics").text
        for engine in (0, 1):
            (count,) = re.findall(
                rf'^vllm_sink:compactions_total{{engine="{engine}",.*}} (\S+)$', served, re.M
            )
            assert float(count) > 0

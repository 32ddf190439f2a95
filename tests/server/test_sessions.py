"""Conversations that a real server keeps, as its clients see them."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from .chats import (
    BUFFER,
    END,
    KEY,
    MAX_MODEL_LEN,
    MODEL,
    OTHER_KEY,
    QUESTIONS,
    SYSTEM,
    ByHand,
    ask,
    chat,
    delete,
    ending,
    first,
    get,
    limit,
    post,
    serving,
    streamed,
)
from .conftest import Server, wait_for

pytestmark = pytest.mark.slow

SESSIONS = 80
"""That a key may have."""
TURN_TOKENS = 2000


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "sessions.sqlite"


@pytest.fixture(scope="module")
def server(
    speaker: Path, database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    limits = {"session-limit": SESSIONS, "session-turn-limit": TURN_TOKENS}
    with serving(speaker, tmp_path_factory.mktemp("log"), f"sqlite:{database}", **limits) as made:
        yield made


@pytest.fixture
def id(request: pytest.FixtureRequest, server: Server) -> Iterator[str]:
    """Of a session that is gone after the test."""
    name = f"test:{abs(hash(request.node.name))}"
    yield name
    delete(server, f"sessions/{name}")


@pytest.mark.parametrize("whole_history", [False, True], ids=["new messages", "whole history"])
def test_answers_are_those_of_one_stream(
    server: Server, tokenizer: PreTrainedTokenizerBase, id: str, whole_history: bool
) -> None:
    by_hand = ByHand(server, tokenizer, BUFFER)
    history: list[dict[str, Any]] = []
    for turn, question in enumerate(QUESTIONS):
        options = ending(turn, tokenizer)
        expected = by_hand.ask(question, limit(turn), **options)
        new = [{"role": "user", "content": question}] if turn else first(question)
        history += new
        body = chat(id, history if whole_history else new, max_tokens=limit(turn), **options)
        if turn % 2:
            answer = streamed(server, **body)
            content = answer["content"]
        else:
            answer = ask(server, id, body["messages"], **body | {"return_token_ids": True})
            content = answer["choices"][0]["message"]["content"]
            answer = answer["choices"][0] | answer
        assert answer["token_ids"] == expected
        assert answer["finish_reason"] == ("stop" if options else "length")
        # What is told of the answer's length is told of it alone.
        assert answer["usage"]["completion_tokens"] == len(expected)
        history.append({"role": "assistant", "content": content})
    shown = get(server, f"sessions/{id}").json()
    assert shown["position"] == by_hand.position > 3 * MAX_MODEL_LEN
    assert shown["buffered_tokens"] == len(by_hand.tokens)
    assert shown["turns"] == len(QUESTIONS)
    assert by_hand.compactions > 2


def test_old_text_is_not_read_again(server: Server, id: str) -> None:
    """A turn computes what it adds, and what of a block was not full."""
    ask(server, id, "Word " * 150, max_tokens=1)
    for _ in range(4):
        usage = ask(server, id, "And? " * 10, max_tokens=10)["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert usage["prompt_tokens"] - cached < 32 + 80
        shown = get(server, f"sessions/{id}").json()
        assert shown["resident_tokens"] > shown["buffered_tokens"] - 2 * 32


def test_a_system_prompt_that_will_be_forgotten_is_told_once(
    server: Server, tokenizer: PreTrainedTokenizerBase, id: str
) -> None:
    for question in ("Hello", "More", "And more"):
        ask(server, id, first(question) if question == "Hello" else question)
    (line,) = [line for line in server.log.read_text().splitlines() if f"'{id}'" in line]
    needed = len(tokenizer.encode(f"<|im_start|>system\n{SYSTEM}{END}\n<|im_start|>user\n"))
    assert f"--sink-tokens {needed} would keep it, S is {BUFFER.sinks}." in line


def test_an_answer_that_is_cut_behind_a_line_is_closed(
    server: Server, tokenizer: PreTrainedTokenizerBase, id: str
) -> None:
    """The template has a line's end behind its end of an answer, which alone is none."""
    (line_end,) = tokenizer.encode("\n", add_special_tokens=False)
    ask(server, id, QUESTIONS[0], max_tokens=2, logit_bias={str(line_end): 100.0})
    answer = ask(server, id, "Why?", return_token_ids=True)
    read = tokenizer.decode(answer["prompt_token_ids"])
    assert read.endswith(
        "\n\n\n<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    ), read


def test_a_history_that_contradicts(server: Server, id: str) -> None:
    said = ask(server, id, first("Hello"))["choices"][0]["message"]["content"]
    other = [*first("Hello"), {"role": "assistant", "content": said + "!"}]
    new = {"role": "user", "content": "More"}
    refused = post(server, "chat/completions", **chat(id, [*other, new]))
    assert refused.status_code == 409
    assert refused.json()["error"]["message"] == (
        "the history differs from what the session has, from messages[2] on."
    )
    refused = post(server, "chat/completions", **chat(id, first("Hello")))
    assert refused.status_code == 409
    assert "ends after 2 messages, the session has 3" in refused.text
    assert get(server, f"sessions/{id}").json()["turns"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_one_turn_at_a_time(server: Server, id: str, stream: bool) -> None:
    ask(server, id, "Hello")
    with ThreadPoolExecutor() as pool:
        body = chat(id, "Long", max_tokens=600, ignore_eos=True, stream=stream)
        running = pool.submit(post, server, "chat/completions", **body)
        wait_for(lambda: server.metric("vllm:num_requests_running") > 0, timeout=30)
        refused = post(server, "chat/completions", **chat(id, "Meanwhile"))
        assert refused.status_code == 409
        assert "under way" in refused.text
        assert refused.headers["Retry-After"] == "1"
        assert running.result().status_code == 200
    assert get(server, f"sessions/{id}").json()["turns"] == 2
    ask(server, id, "Afterwards")


@contextmanager
def hung_up(server: Server, body: dict[str, Any]) -> Iterator[None]:
    """A client that goes away in the middle of its answer."""
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{server.url}/v1/chat/completions"
    if body.get("stream"):
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
            lines = response.iter_lines()
            for _ in range(20):
                next(lines)
            yield
        return
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, headers=headers, timeout=1.5)
    yield


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_a_client_that_hangs_up(server: Server, id: str, stream: bool, partial: bool) -> None:
    ask(server, id, "Hello")
    before = get(server, f"sessions/{id}").json()
    body = chat(id, "Long", max_tokens=1900, ignore_eos=True, stream=stream)
    with hung_up(server, body | {"session_partial": partial}):
        pass
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, timeout=30)
    if partial:
        wait_for(lambda: get(server, f"sessions/{id}").json()["turns"] == 2, timeout=10)
        assert get(server, f"sessions/{id}").json()["position"] > before["position"] + 15
    else:
        time.sleep(0.5)
        assert get(server, f"sessions/{id}").json()["turns"] == 1
    after = ask(server, id, "Afterwards", return_token_ids=True)
    assert get(server, f"sessions/{id}").json()["turns"] == 2 + partial
    assert len(after["choices"][0]["token_ids"]) == 12


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_turn(server: Server, id: str, stream: bool) -> None:
    """The committed answer again, whole: its text, its log-probabilities, its usage."""
    ask(server, id, "Hello")
    key = {"Idempotency-Key": "one"}
    body = chat(id, "More", logprobs=True, top_logprobs=2)
    once = post(server, "chat/completions", headers=key, **body).json()
    if stream:
        again = streamed_with(server, key, body)
        assert again == once["choices"][0]["message"]["content"]
    else:
        again = post(server, "chat/completions", headers=key, **body).json()
        for answer in (once, again):
            del answer["id"], answer["created"]
        assert again == once
    assert get(server, f"sessions/{id}").json()["turns"] == 2
    refused = post(server, "chat/completions", headers=key, **chat(id, "Other"))
    assert refused.status_code == 409
    assert "another request" in refused.text
    ask(server, id, "Next")
    refused = post(server, "chat/completions", headers=key, **body)
    assert refused.status_code == 409
    assert "not kept any more" in refused.text


def streamed_with(server: Server, headers: dict[str, str], body: dict[str, Any]) -> str:
    response = post(server, "chat/completions", headers=headers, stream=True, **body)
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_forks(server: Server, id: str) -> None:
    ask(server, id, "Word " * 100)
    fork = post(server, f"sessions/{id}/fork").json()
    named = post(server, f"sessions/{id}/fork", session_id=f"{id}:named")
    assert named.status_code == 200
    assert post(server, f"sessions/{id}/fork", session_id=f"{id}:named").status_code == 409
    answers = [
        ask(server, one, "And?", return_token_ids=True) for one in (id, fork["id"], f"{id}:named")
    ]
    assert len({tuple(answer["choices"][0]["token_ids"]) for answer in answers}) == 1
    for answer in answers:
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 64
    ask(server, id, "Alone")
    assert get(server, f"sessions/{fork['id']}").json()["turns"] == 2
    for one in (fork["id"], f"{id}:named"):
        assert delete(server, f"sessions/{one}").json()["deleted"] is True


def test_a_session_is_its_owners(server: Server, id: str) -> None:
    ask(server, id, "Hello")
    never = f"{id}:never"
    for method in (get, delete):
        theirs = method(server, f"sessions/{id}", key=OTHER_KEY)
        nobodys = method(server, f"sessions/{never}", key=OTHER_KEY)
        assert theirs.status_code == nobodys.status_code == 404
        assert theirs.text == nobodys.text.replace(never, id)
    assert post(server, f"sessions/{id}/fork", key=OTHER_KEY).status_code == 404
    assert get(server, "sessions", key=OTHER_KEY).json()["data"] == []
    # The same name is another session of theirs.
    answer = post(server, "chat/completions", key=OTHER_KEY, **chat(id, "Hello"))
    assert answer.status_code == 200
    assert get(server, f"sessions/{id}").json()["turns"] == 1
    assert delete(server, f"sessions/{id}", key=OTHER_KEY).status_code == 200
    assert get(server, f"sessions/{id}").status_code == 200
    assert httpx.get(f"{server.url}/v1/sessions").status_code == 401


def test_lists(server: Server) -> None:
    ids = [f"list:{i}" for i in range(7)]
    for one in ids:
        ask(server, one, "Hello", max_tokens=1)
    seen: list[str] = []
    after = "list:"
    while True:
        page = get(server, f"sessions?after={after}&limit=3").json()
        seen += [one["id"] for one in page["data"]]
        after = seen[-1]
        if not page["has_more"]:
            break
    assert [one for one in seen if one.startswith("list:")] == ids
    for one in ids:
        delete(server, f"sessions/{one}")


def test_limits(server: Server, id: str) -> None:
    long = post(server, "chat/completions", **chat(id, "Hello", max_tokens=TURN_TOKENS))
    assert long.status_code == 429
    assert f"{TURN_TOKENS} tokens a turn" in long.text
    long = post(server, "chat/completions", **chat(id, "Hello " * TURN_TOKENS))
    assert long.status_code == 429
    ask(server, id, "Hello")
    forks = []
    while (fork := post(server, f"sessions/{id}/fork")).status_code == 200:
        forks.append(fork.json()["id"])
    assert len(forks) < SESSIONS
    assert fork.status_code == 429
    assert fork.headers["Retry-After"]
    refused = post(server, "chat/completions", **chat(f"{id}:new", "Hello"))
    assert refused.status_code == 429
    assert f"accepted are {SESSIONS} of a key" in refused.text
    ask(server, id, "A turn of what is there")
    for one in forks:
        delete(server, f"sessions/{one}")


BAD = {
    "two answers": ({"n": 2}, "n=2: accepted with a session is 1."),
    "an echo": ({"echo": True}, "echo=True: accepted with a session is False."),
    "prompt log-probabilities": (
        {"prompt_logprobs": 1},
        "prompt_logprobs=1: accepted with a session is None.",
    ),
    "an id with a slash": ({"session_id": "a/b"}, "session_id='a/b': accepted are"),
    "an empty turn": ({"messages": []}, ""),
    "too long a prompt": ({"messages": chat(None, "Word " * 520)["messages"]}, "accepted are 511"),
    "an image": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:,"}}],
                }
            ]
        },
        "text alone",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(server: Server, id: str, name: str) -> None:
    changes, sentence = BAD[name]
    refused = post(server, "chat/completions", **chat(id, "Hello") | changes)
    assert refused.status_code == 400, refused.text
    assert sentence in refused.json()["error"]["message"]
    assert get(server, f"sessions/{id}").status_code == 404
    ask(server, id, "Hello")


def test_a_database_that_another_process_locks(server: Server, database: Path, id: str) -> None:
    ask(server, id, "Hello")
    body = chat(id, "More", max_tokens=5)
    with sqlite3.connect(database, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        refused = post(server, "chat/completions", **body)
        other.execute("ROLLBACK")
    other.close()
    assert refused.status_code == 503
    assert refused.headers["Retry-After"]
    assert "locked by another process" in refused.text
    ask(server, id, "More")
    assert get(server, f"sessions/{id}").json()["turns"] == 2


def test_completions(server: Server, tokenizer: PreTrainedTokenizerBase, id: str) -> None:
    """A client sends what is new, as text or as tokens."""
    stream: list[int] = []
    for turn, text in enumerate(["Light is", " a wave and", " "]):
        body = {"model": MODEL, "max_tokens": 6, "temperature": 0.0, "return_token_ids": True}
        prompt = tokenizer.encode(text) if turn == 1 else text
        answer = post(server, "completions", **body, prompt=prompt, session_id=id).json()
        stream += tokenizer.encode(text)
        expected = post(server, "completions", **body, prompt=stream, cache_salt="by hand").json()
        assert answer["choices"][0]["token_ids"] == expected["choices"][0]["token_ids"]
        stream += expected["choices"][0]["token_ids"]
    refused = post(server, "completions", **body, prompt=["a", "b"], session_id=id)
    assert refused.status_code == 400
    assert "a list of 2" in refused.text
    refused = post(server, "chat/completions", **chat(id, "Hello"))
    assert refused.status_code == 409
    assert "begun with completions" in refused.text


def test_without_a_session_nothing_is_kept(server: Server) -> None:
    before = get(server, "sessions").json()
    ask(server, None, "Hello")
    assert get(server, "sessions").json() == before


def test_many_at_once(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sessions that take turns beside each other say what they say alone."""
    ids = [f"many:{i}" for i in range(24)]
    barrier = threading.Barrier(len(ids))

    def run(one: str) -> list[list[int]]:
        barrier.wait()
        said = []
        for turn in range(3):
            answer = ask(server, one, f"{one} {turn} " * 8, return_token_ids=True)
            said.append(answer["choices"][0]["token_ids"])
        return said

    with ThreadPoolExecutor(len(ids)) as pool:
        together = list(pool.map(run, ids))
    for one in ids:
        delete(server, f"sessions/{one}")
    barrier = threading.Barrier(1)
    assert [run(one) for one in ids[:4]] == together[:4]
    for one in ids[:4]:
        delete(server, f"sessions/{one}")
    assert server.metric("vllm_sink:kv_blocks_held") == 0

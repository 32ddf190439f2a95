"""Clients that people have: each may lead a long conversation, and calls tools, and reasons."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from benchmarks.harness import venvs

from .chats import BUFFER, KEY, MAX_MODEL_LEN, MODEL, QUESTIONS, SYSTEM, ByHand, first, get, serving
from .conftest import Server

pytestmark = pytest.mark.slow

TURNS = QUESTIONS[:10]
LIMIT = 30
"""Tokens of an answer."""
THINK = {"<gh_stars>": "<think>", "<issue_start>": "</think>"}
"""Tokens that the tokenizer has and no text uses, and what they are to be."""


@pytest.fixture(scope="module")
def thinker(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speaker, with tokens between which a model reasons."""
    path = copytree(speaker, tmp_path_factory.mktemp("thinker") / "tiny")
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] in THINK:
            token |= {"content": THINK[token["content"]], "special": False}
    vocabulary = tokenizer["model"]["vocab"]
    for old, new in THINK.items():
        vocabulary[new] = vocabulary.pop(old)
    file.write_text(json.dumps(tokenizer))
    return path


@pytest.fixture(scope="module")
def server(thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients")
    parsers = {
        "enable-auto-tool-choice": True,
        "tool-call-parser": "hermes",
        # It looks for reasoning where a request asks for it.
        "reasoning-parser": "deepseek_v3",
        "structured-outputs-config": json.dumps({"enable_in_reasoning": True}),
    }
    with serving(thinker, folder, f"sqlite:{folder / 'sessions.sqlite'}", **parsers) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=240)


def settings(server: Server) -> dict[str, Any]:
    return {"model": MODEL, "temperature": 0.0, "max_tokens": LIMIT}


def openai(server: Server, id: str) -> list[str]:
    """New messages alone."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=240)
    answers = []
    for turn, question in enumerate(TURNS):
        messages: Any = [{"role": "user", "content": question}] if turn else first(question)
        request = settings(server) | {"messages": messages, "extra_body": {"session_id": id}}
        if turn % 2:
            chunks = client.chat.completions.create(**request, stream=True)
            answers.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
        else:
            answer = client.chat.completions.create(**request)
            answers.append(answer.choices[0].message.content)
    return answers


def curl(server: Server, id: str) -> list[str]:
    """New messages alone; the session is named in a header."""
    headers = [f"Authorization: Bearer {KEY}", "Content-Type: application/json"]
    headers.append(f"X-Session-ID: {id}")
    command = ["curl", "--silent", "--show-error", "--fail-with-body", "--no-buffer"]
    command += [part for header in headers for part in ("--header", header)]
    command += [f"{server.url}/v1/chat/completions", "--data", "@-"]
    answers = []
    for turn, question in enumerate(TURNS):
        messages = [{"role": "user", "content": question}] if turn else first(question)
        request = settings(server) | {"messages": messages, "stream": bool(turn % 2)}
        told = subprocess.run(command, input=json.dumps(request), text=True, capture_output=True)
        assert told.returncode == 0, told
        if turn % 2:
            *chunks, done = [line for line in told.stdout.splitlines() if line]
            assert done == "data: [DONE]"
            deltas = [json.loads(line.removeprefix("data: "))["choices"][0] for line in chunks]
            answers.append("".join(choice["delta"].get("content") or "" for choice in deltas))
        else:
            answers.append(json.loads(told.stdout)["choices"][0]["message"]["content"])
    return answers


def langchain(server: Server, id: str, **named: Any) -> list[str]:
    """The whole history."""
    model = settings(server) | {"base_url": f"{server.url}/v1", "api_key": KEY, "max_retries": 0}
    told = {"model": model | named, "system": SYSTEM, "questions": TURNS}
    command = [*venvs.isolated("clients"), str(Path(__file__).with_name("langchain_chat.py"))]
    chat = subprocess.run(command, input=json.dumps(told), text=True, capture_output=True)
    assert chat.returncode == 0, chat.stderr
    answers: list[str] = json.loads(chat.stdout)
    return answers


CLIENTS: dict[str, Callable[[Server, str], list[str]]] = {
    "openai": openai,
    "curl": curl,
    "langchain, header": lambda server, id: langchain(
        server, id, default_headers={"X-Session-ID": id}
    ),
    "langchain, body": lambda server, id: langchain(server, id, extra_body={"session_id": id}),
}


@pytest.fixture(scope="module")
def by_hand(server: Server, thinker: Path) -> tuple[list[str], int]:
    """The answers of one stream without a session, and how long it is."""
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    stream = ByHand(server, tokenizer, BUFFER)
    answers = [stream.ask(question, LIMIT) for question in TURNS]
    assert stream.compactions > 1
    return tokenizer.batch_decode(answers, skip_special_tokens=True), stream.position


@pytest.mark.parametrize("name", CLIENTS)
def test_a_long_conversation(server: Server, by_hand: tuple[list[str], int], name: str) -> None:
    answers, position = by_hand
    id = f"long:{[*CLIENTS].index(name)}"
    assert CLIENTS[name](server, id) == answers
    shown = get(server, f"sessions/{id}").json()
    assert shown["turns"] == len(TURNS)
    assert shown["position"] == position > MAX_MODEL_LEN > BUFFER.mark


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "How it is outside.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def terse(thinker: Path) -> dict[str, Any]:
    """Of a request: what keeps a random model from going on where a grammar lets it."""
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    spaces = [id for id in range(len(tokenizer)) if not tokenizer.decode([id]).strip()]
    return {"logit_bias": dict.fromkeys(map(str, spaces), -100), "parallel_tool_calls": False}


def asked(client: OpenAI, id: str, messages: list[Any], stream: bool, **options: Any) -> Any:
    """The message that the answer is, its tokens, and why it ends."""
    extra = {"session_id": id, "return_token_ids": True, **options.pop("extra_body", {})}
    request: Any = {"model": MODEL, "temperature": 0.0, "messages": messages, "extra_body": extra}
    request |= {"max_tokens": 60} | options
    if not stream:
        (choice,) = client.chat.completions.create(**request).choices
        message = choice.message.model_dump(exclude_none=True)
        return message, choice.token_ids, choice.finish_reason
    message, tokens, reason = {"role": "assistant"}, [], None
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            said = choice.delta.model_dump(exclude_none=True)
            for call in said.pop("tool_calls", ()):
                assert call.pop("index") == 0
                (whole,) = message.setdefault("tool_calls", [{"function": {"arguments": ""}}])
                whole["function"]["arguments"] += call["function"].pop("arguments", "")
                whole["function"] |= call.pop("function")
                whole |= call
            for name in {"content", "reasoning"} & {*said}:
                message[name] = message.get(name, "") + said[name]
            tokens += (choice.model_extra or {}).get("token_ids") or []
            reason = choice.finish_reason
    return message, tokens, reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("choice", "reason"), [(NAMED, "stop"), ("required", "tool_calls")])
def test_a_tool_is_called(
    client: OpenAI,
    server: Server,
    terse: dict[str, Any],
    choice: Any,
    reason: str,
    stream: bool,
) -> None:
    """Its reply goes on with the conversation, whether it comes alone or with all before it."""
    seen = []
    for whole_history in (False, True):
        id = f"tools:{reason}:{stream}:{whole_history}"
        history: list[Any] = first("How is the weather?")
        called, tokens, why = asked(
            client, id, history, stream, tools=TOOLS, tool_choice=choice, **terse
        )
        assert why == reason
        (call,) = called["tool_calls"]
        assert (call["type"], call["function"]["name"]) == ("function", "weather")
        assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
        said = [tokens]
        replies = [
            {"role": "tool", "tool_call_id": call["id"], "content": "Rain."},
            {"role": "user", "content": "And tomorrow?"},
        ]
        for reply in replies:
            history += [called, reply]
            messages = history if whole_history else [reply]
            called, tokens, why = asked(
                client, id, messages, stream, tools=TOOLS, tool_choice="none"
            )
            assert why == "length"
            said.append(tokens)
        seen.append(said)
        assert get(server, f"sessions/{id}").json()["turns"] == len(said)
    assert seen[0] == seen[1]


def thinking(thinker: Path) -> dict[str, Any]:
    """A request that reasons for some letters, and answers with others."""
    end = AutoTokenizer.from_pretrained(thinker).convert_tokens_to_ids("</think>")
    return {
        "logit_bias": {str(end): 100},
        "extra_body": {
            "chat_template_kwargs": {"thinking": True},
            "structured_outputs": {"regex": "[a-z ]{9}</think>[a-z ]{9}"},
        },
    }


@pytest.mark.parametrize("stream", [False, True])
def test_a_history_without_the_reasoning(
    client: OpenAI, server: Server, thinker: Path, stream: bool
) -> None:
    options = thinking(thinker)
    id = f"reasoning:{stream}"
    history: list[Any] = first("Why?")
    for turn in range(3):
        message, _, _ = asked(client, id, history, stream, **options)
        assert len(message.pop("reasoning")) == len(message["content"]) == 9, turn
        history += [message, {"role": "user", "content": f"And {turn}?"}]
    assert get(server, f"sessions/{id}").json()["turns"] == 3

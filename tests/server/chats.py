"""Chats with a real server, through its sessions and by hand."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from vllm_sink.buffer import Buffer

from .conftest import NO_TLS, Server, started

BUFFER = Buffer(4, 124, 400)
MAX_MODEL_LEN = 512
MODEL = "tiny"
KEY, OTHER_KEY = "first-key", "second-key"
END = "<|im_end|>"
SYSTEM = "Be brief, and kind."
QUESTIONS = [f"Question {i}: why is {'light ' * (20 * (i % 4))}so?" for i in range(30)]
SECONDS = 240


SETTINGS = {
    "served-model-name": MODEL,
    "dtype": "float32",
    "sink-tokens": BUFFER.sinks,
    "window-tokens": BUFFER.window,
    "compact-tokens": BUFFER.mark,
    "max-model-len": MAX_MODEL_LEN,
    "block-size": 32,
    "kv-cache-memory-bytes": 2**26,
    "enforce-eager": True,
}


def serving(speaker: Path, folder: Path, store: str, **changes: Any) -> Any:
    settings = SETTINGS | {
        "model": speaker,
        "max-num-seqs": 8,
        "session-store": store,
        # The model in the engine's process: one process less to start.
        "distributed-executor-backend": "uni",
    }
    flags = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in (settings | changes).items()
    ]
    flags += ["--api-key", KEY, OTHER_KEY]
    command = [sys.executable, "-m", "vllm_sink.serve", *flags]
    return started(command, folder, multiprocessing=False)


def post(server: Server, path: str, key: str = KEY, headers: Any = (), **body: Any) -> Any:
    """The response, read."""
    return httpx.post(
        f"{server.url}/v1/{path}",
        json=body,
        headers={"Authorization": f"Bearer {key}", **dict(headers)},
        timeout=SECONDS,
        verify=NO_TLS,
    )


def get(server: Server, path: str, key: str = KEY) -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{server.url}/v1/{path}", headers=headers, timeout=SECONDS, verify=NO_TLS)


def delete(server: Server, path: str, key: str = KEY) -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.delete(f"{server.url}/v1/{path}", headers=headers, timeout=SECONDS, verify=NO_TLS)


def chat(id: str | None, said: str | Sequence[Any], **body: Any) -> dict[str, Any]:
    """A request's body: `said` is a question, or all messages."""
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else [*said]
    defaults = {"model": MODEL, "messages": messages, "temperature": 0.0, "max_tokens": 12}
    session = {} if id is None else {"session_id": id}
    return defaults | session | body


def ask(server: Server, id: str | None, said: str | Sequence[Any], **body: Any) -> dict[str, Any]:
    response = post(server, "chat/completions", **chat(id, said, **body))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def streamed(server: Server, **body: Any) -> dict[str, Any]:
    """A chat's answer from its chunks, in the form of one that is not streamed."""
    answer: dict[str, Any] = {"content": "", "token_ids": [], "finish_reason": None}
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    request = {
        "url": f"{server.url}/v1/chat/completions",
        "json": body | options,
        "headers": {"Authorization": f"Bearer {KEY}"},
    }
    with httpx.stream("POST", **request, timeout=SECONDS, verify=NO_TLS) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for chunk in map(json.loads, lines):
        assert "error" not in chunk, chunk
        answer["prompt_token_ids"] = chunk.get("prompt_token_ids") or answer.get("prompt_token_ids")
        answer["usage"] = chunk.get("usage")
        for choice in chunk["choices"]:
            answer["content"] += choice["delta"].get("content") or ""
            answer["token_ids"] += choice.get("token_ids") or []
            answer["finish_reason"] = choice["finish_reason"]
    return answer


def first(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def limit(turn: int) -> int:
    return 8 + turn % 7


def ending(turn: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Some answers end with the token that ends an answer, after their limit's half."""
    if turn % 3:
        return {}
    return {"logit_bias": {str(tokenizer.convert_tokens_to_ids(END)): 100.0}, "min_tokens": 4}


@dataclass
class ByHand:
    """One stream whose client keeps its tokens itself, and compacts them; it uses no session, and
    no block of one."""

    server: Server
    tokenizer: PreTrainedTokenizerBase
    buffer: Buffer
    tokens: list[int] = field(default_factory=list)
    position: int = 0
    compactions: int = 0

    def ask(self, question: str, limit: int, **body: Any) -> list[int]:
        """The answer's tokens."""
        text = f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n"
        if self.tokens:
            ended = self.tokens[-1] == self.tokenizer.convert_tokens_to_ids(END)
            text = ("\n" if ended else f"{END}\n") + text
        else:
            text = f"<|im_start|>system\n{SYSTEM}{END}\n{text}"
        added = self.tokenizer.encode(text, add_special_tokens=False)
        self.tokens += added
        request = {"model": MODEL, "prompt": self.tokens, "max_tokens": limit, "temperature": 0.0}
        request |= {"cache_salt": "by hand", "return_token_ids": True}
        answer = post(self.server, "completions", **(request | body)).json()
        generated: list[int] = answer["choices"][0]["token_ids"]
        for token in generated:
            self.tokens.append(token)
            if len(self.tokens) >= self.buffer.mark:
                self.compactions += 1
                head, tail = self.tokens[: self.buffer.sinks], self.tokens[-self.buffer.window :]
                self.tokens = head + tail
        self.position += len(added) + len(generated)
        return generated

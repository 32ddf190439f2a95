"""One conversation with several servers, whose clients send new messages alone or all of them."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from rich.console import Console

from benchmarks.harness import results, servers
from benchmarks.harness.servers import TRAINED_CONTEXT, Shape
from benchmarks.texts.passages import passages
from benchmarks.texts.tokens import book_tokens
from benchmarks.turns import asking
from benchmarks.turns.asking import RefusedError, ask
from vllm_sink import cpu, embedded
from vllm_sink.buffer import Buffer
from vllm_sink.geometry import Geometry

ENDS = ("<|im_end|>", "<|endoftext|>")
"""Tokens that no answer has, so that all get as long as they may."""
NEVER = -100


@dataclass(frozen=True)
class Plan:
    buffer: Buffer
    turns: int
    question: int
    """Tokens, of a book; a message has a few more."""
    answer: int
    stretch: int
    """Turns that are compared, of the last that every server answers."""


@dataclass(frozen=True)
class Arm:
    server: str
    """One of `servers.ARMS`."""
    has_session: bool = False
    sends_all: bool = True


ARMS = {
    "session": Arm("sink", has_session=True, sends_all=False),
    "session-all": Arm("sink", has_session=True),
    "dense": Arm("dense"),
    "llamacpp": Arm("llamacpp"),
}


@dataclass
class Speaker:
    """A client in its conversation with one server."""

    name: str
    client: httpx.Client
    body: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    refusal: str | None = None

    def ask(self, question: str) -> None:
        if self.refusal:
            return
        self.messages.append({"role": "user", "content": question})
        sent = self.messages if ARMS[self.name].sends_all else self.messages[-1:]
        try:
            answer = ask(self.client, "chat/completions", messages=sent, **self.body)
        except RefusedError as error:
            self.refusal = str(error)
            return
        self.messages.append({"role": "assistant", "content": answer.text})
        self.turns.append(
            {
                "first_ms": round(answer.first_ms, 1),
                "prompt_tokens": answer.prompt_tokens,
                "cached_tokens": answer.cached_tokens,
            }
        )


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Turn by turn, one server after the other, so that what else the machine does meets all."""
    text = book_tokens(embedded.path())
    tokenizer = tokenizer_of(embedded.path())
    questions = [tokenizer.decode(one) for one in passages(text, plan.turns, plan.question)]
    bias = {str(id): NEVER for id in tokenizer.convert_tokens_to_ids([*ENDS])}
    with ExitStack() as stack:
        store = f"sqlite:{stack.enter_context(TemporaryDirectory())}/sessions.sqlite"
        with console.status("servers start"):
            targets = {
                arm: stack.enter_context(servers.started(command(plan, arm, store)))
                for arm in sorted({arm.server for arm in ARMS.values()})
            }
        speakers = []
        for name, arm in ARMS.items():
            target = targets[arm.server]
            target.check()  # so that none is asked for the first time in a turn
            body = {"model": target.model, "max_tokens": plan.answer, "logit_bias": bias}
            if arm.has_session:
                # Of the same words, but not of the same blocks.
                body |= {"session_id": name, "cache_salt": name}
            client = stack.enter_context(asking.client(target))
            speakers.append(Speaker(name, client, body))
        for turn, question in enumerate(questions):
            with console.status(f"turn {turn + 1} of {plan.turns}"):
                for speaker in speakers:
                    speaker.ask(question)
    arms = {one.name: {"turns": one.turns, "refusal": one.refusal} for one in speakers}
    return {"arms": arms, "over_session": over_session(plan, arms)}


def over_session(plan: Plan, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """First tokens of each other arm over those of sessions, turn by turn, and how these change
    from the first turns to the last."""
    common = min(len(arm["turns"]) for arm in arms.values())
    found = {}
    for name, arm in arms.items():
        ours, theirs = (
            [turn["first_ms"] for turn in one["turns"][:common]] for one in (arms["session"], arm)
        )
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)][-plan.stretch :]
        # The first turn is of an empty cache, and of a server that was never asked.
        growth = median(theirs[-plan.stretch :]) / median(theirs[1 : plan.stretch + 1])
        found[name] = {"ratio": results.spread(ratios, 2), "last_over_first": round(growth, 3)}
    return {"until_turn": common, "arms": found}


def tokenizer_of(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def command(plan: Plan, arm: str, store: str) -> Callable[[int], list[str]]:
    """To serve on a port; llama.cpp with a context as long as the trained one."""
    kept = TRAINED_CONTEXT if arm == "llamacpp" else plan.buffer.kept
    geometry = Geometry(plan.buffer.sinks, kept - plan.buffer.sinks)
    shape = Shape(embedded.path(), cpu.fast_dtype(), 1, geometry)
    added = {
        "sink": servers.flags({"session-store": store, "compact-tokens": plan.buffer.mark}),
        "dense": ["--enable-prompt-tokens-details"],
    }
    return lambda port: [*servers.ARMS[arm].command(shape, port), *added.get(arm, ())]

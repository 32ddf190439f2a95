"""Turns at places of sessions: near the beginning and far from it, with what a turn finds cached.

A session gets to a place by real turns, with prompts as long as a turn may have: what a session is
far down is what its buffer is, so both places have buffers of one length. Each turn is taken by a
fork of the session at the place, which leaves the session where it is; the fork of a hit finds the
session's blocks, and that of a miss has a cache salt of its own, under which there are none.
"""

import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from benchmarks.harness import results
from benchmarks.harness.cli import BenchmarkError
from benchmarks.harness.servers import Target
from benchmarks.harness.tiny import VOCABULARY
from benchmarks.turns import asking
from benchmarks.turns.asking import Answer, ask
from vllm_sink.buffer import Buffer

KINDS = ("hit", "miss")


@dataclass(frozen=True)
class Plan:
    buffer: Buffer
    positions: tuple[int, ...]
    """In tokens; the first is the one that others are compared with."""
    rounds: int
    """Turns at each place, of each kind."""
    piece: int = 100_000
    """Tokens of a turn on the way, at most."""
    question: int = 50
    answer: int = 4

    @property
    def buffered(self) -> tuple[int, int]:
        """Tokens of buffers: just compacted, and one that a turn takes to just below the mark."""
        return self.buffer.kept, self.buffer.mark - 1 - self.question - self.answer

    def turns(self, position: int, buffered: int) -> list[int]:
        """Tokens of the turns that take a session to `position`, with `buffered` tokens held."""
        rest = position - (buffered - self.buffer.kept)
        pieces = -(-rest // self.piece)
        turns = [rest // pieces + (turn < rest % pieces) for turn in range(pieces)]
        return [*turns, position - rest] if position > rest else turns


def text(seed: object, count: int) -> list[int]:
    """Tokens that every model here has."""
    return random.Random(str(seed)).choices(range(VOCABULARY), k=count)


@dataclass(frozen=True)
class Place:
    client: httpx.Client
    plan: Plan
    position: int
    buffered: int

    @property
    def id(self) -> str:
        return f"{self.position}.{self.buffered}"

    def reach(self) -> None:
        """Raises:
        BenchmarkError: the session did not get to be what was planned.
        """
        for turn, tokens in enumerate(self.plan.turns(self.position, self.buffered)):
            self.ask(self.id, text((self.id, turn), tokens - 1), max_tokens=1)
        seen = self.client.get(f"sessions/{self.id}").json()
        if (seen["position"], seen["buffered_tokens"]) != (self.position, self.buffered):
            raise BenchmarkError(f"A session was to get to {self.id}, and is now {seen}.")

    def turn(self, kind: str, name: object) -> Answer:
        """One of a fork; turns of another `name` ask something else."""
        fork = f"{self.id}.{kind}.{name}"
        self.client.post(f"sessions/{self.id}/fork", json={"session_id": fork}).raise_for_status()
        salt = {"cache_salt": fork} if kind == "miss" else {}
        question = text(name, self.plan.question)
        answer = self.ask(fork, question, max_tokens=self.plan.answer, **salt)
        self.client.delete(f"sessions/{fork}").raise_for_status()
        return answer

    def ask(self, id: str, prompt: list[int], **body: Any) -> Answer:
        fixed = {"model": "served", "ignore_eos": True}
        return ask(self.client, "completions", session_id=id, prompt=prompt, **fixed, **body)


def measure(target: Target, plan: Plan) -> list[dict[str, Any]]:
    rows = []
    with asking.client(target) as client:
        for buffered in plan.buffered:
            places = [Place(client, plan, position, buffered) for position in plan.positions]
            for place in places:
                place.reach()
            for kind in KINDS:
                for place in places:
                    place.turn("hit", "before")  # whose blocks are there from now on
                rounds = [side_by_side(places, kind, number) for number in range(plan.rounds)]
                rows.append(row(places, kind, rounds))
    return rows


def side_by_side(places: list[Place], kind: str, number: int) -> list[Answer]:
    """A turn at each place, which begins where the last one ended."""
    order = places[:: -1 if number % 2 else 1]
    answers = [place.turn(kind, number) for place in order]
    return answers[:: -1 if number % 2 else 1]


def row(places: list[Place], kind: str, rounds: list[list[Answer]]) -> dict[str, Any]:
    spread = partial(results.spread, digits=2)
    seen = [
        {
            "position": place.position,
            "first_ms": spread([answer.first_ms for answer in answers]),
            "read_tokens": max(answer.prompt_tokens for answer in answers),
            "computed_tokens": max(computed(answer) for answer in answers),
        }
        for place, answers in zip(places, zip(*rounds, strict=True), strict=True)
    ]
    ratios = [[answer.first_ms / near.first_ms for answer in far] for near, *far in rounds]
    return {
        "buffered": places[0].buffered,
        "kind": kind,
        "places": seen,
        "ratios": [results.spread([*of_place]) for of_place in zip(*ratios, strict=True)],
    }


def computed(answer: Answer) -> int:
    return answer.prompt_tokens - (answer.cached_tokens or 0)

"""The same turns of sessions that one replica has, that two share, and of a server without Ray."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

from benchmarks.harness import results
from benchmarks.harness.fleet import Fleet, cores_taken
from benchmarks.harness.servers import Target
from benchmarks.turns import asking
from benchmarks.turns.asking import Answer, ask
from benchmarks.turns.places import text
from benchmarks.turns.routed import in_turns

ARMS = ("straight", "one", "two")
IDLE_SECONDS = 5


@dataclass(frozen=True)
class Work:
    """Of a session."""

    turns: int
    question: int
    answer: int

    @property
    def tokens(self) -> int:
        return self.turns * (self.question + self.answer)


@dataclass(frozen=True)
class Plan:
    sessions: int
    """At once."""
    works: dict[str, Work]
    rounds: int

    @property
    def shares(self) -> dict[str, list[int]]:
        """Sessions of each replica."""
        return {"one": [self.sessions, 0], "two": [self.sessions // 2] * 2}


@dataclass(frozen=True)
class Seen:
    tokens_s: float
    cores: dict[str, float]


def measure(fleet: Fleet, straight: Target, plan: Plan) -> dict[str, Any]:
    rows = [
        {"work": name, **row(fleet, straight, plan, name, work)}
        for name, work in plan.works.items()
    ]
    with cores_taken(fleet.target) as idle:
        time.sleep(IDLE_SECONDS)
    return {"rows": rows, "idle_cores": rounded([idle])}


def row(fleet: Fleet, straight: Target, plan: Plan, name: str, work: Work) -> dict[str, Any]:
    def run(arm: str, number: int) -> Seen:
        prefix = f"{name}.{arm}.{number}"
        if arm == "straight":
            return at_once(straight, [f"{prefix}.{i}" for i in range(plan.sessions)], work)
        return at_once(fleet.target, fleet.names(prefix, plan.shares[arm]), work)

    seen: dict[str, list[Seen]] = {arm: [] for arm in ARMS}
    for number, arms in enumerate(in_turns([*ARMS], 1 + plan.rounds)):
        for arm in arms:
            seen[arm].append(run(arm, number))
    for rounds in seen.values():
        del rounds[0]  # for which some came up from nothing
    return {
        "arms": {
            arm: {
                "tokens_s": results.spread([each.tokens_s for each in rounds], 1),
                "over_one": results.spread(
                    [a.tokens_s / b.tokens_s for a, b in zip(rounds, seen["one"], strict=True)], 3
                ),
                "cores": rounded([each.cores for each in rounds]),
            }
            for arm, rounds in seen.items()
        }
    }


def at_once(target: Target, ids: list[str], work: Work) -> Seen:
    def talk(id: str) -> None:
        with asking.client(target) as http:
            for number in range(work.turns):
                turn(http, id, number, work.question, work.answer)

    with ThreadPoolExecutor(len(ids)) as pool, cores_taken(target) as cores:
        start = time.perf_counter()
        for _ in pool.map(talk, ids):
            pass
        seconds = time.perf_counter() - start
    return Seen(len(ids) * work.tokens / seconds, cores)


def turn(http: httpx.Client, id: str, number: int, question: int, answer: int) -> Answer:
    """Of a session, with a question that no other one has."""
    prompt = text((id, number), question)
    fixed = {"model": "served", "ignore_eos": True}
    return ask(http, "completions", session_id=id, prompt=prompt, max_tokens=answer, **fixed)


def rounded(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each part."""
    parts = sorted({part for each in rounds for part in each})
    return {part: round(median(each.get(part, 0.0) for each in rounds), 2) for part in parts}

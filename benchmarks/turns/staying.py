"""Turns of sessions that stay with their replica, and of others that go where there is less to do.

One turn at a time: no first token waits for anything but its own reading.
"""

from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.fleet import SPREAD, Fleet
from benchmarks.turns import asking
from benchmarks.turns.asking import Answer
from benchmarks.turns.routed import in_turns, percentiles
from benchmarks.turns.sharing import turn

ARMS = ("stay", "spread")


@dataclass(frozen=True)
class Plan:
    sessions: tuple[int, ...]
    first: int
    """Tokens of a session's first question ..."""
    question: int
    """... and of the next ones."""
    answer: int
    turns: int
    rounds: int

    @property
    def questions(self) -> list[int]:
        return [self.first, *[self.question] * (self.turns - 1)]


Turns = list[list[Answer]]
"""Each with an answer of every session."""


def measure(fleet: Fleet, plan: Plan) -> list[dict[str, Any]]:
    return [row(fleet, plan, sessions) for sessions in plan.sessions]


def row(fleet: Fleet, plan: Plan, sessions: int) -> dict[str, Any]:
    seen: dict[str, list[Turns]] = {arm: [] for arm in ARMS}
    for number, arms in enumerate(in_turns([*ARMS], plan.rounds)):
        for arm in arms:
            prefix = f"{sessions}.{number}"
            if arm == "stay":
                ids = fleet.names(prefix, [sessions // 2] * 2)
            else:
                ids = [f"{SPREAD}{prefix}.{session}" for session in range(sessions)]
            seen[arm].append(talk(fleet, ids, plan))
    return {"sessions": sessions, **compared(seen)}


def talk(fleet: Fleet, ids: list[str], plan: Plan) -> Turns:
    with asking.client(fleet.target) as http:
        return [
            [turn(http, id, number, question, plan.answer) for id in ids]
            for number, question in enumerate(plan.questions)
        ]


def compared(seen: dict[str, list[Turns]]) -> dict[str, Any]:
    """Over all turns but the first ones, which find nothing in any case."""
    later = {arm: [flat(turns[1:]) for turns in rounds] for arm, rounds in seen.items()}
    ratios = [
        first_ms(spread) / first_ms(stay)
        for stay, spread in zip(later["stay"], later["spread"], strict=True)
    ]
    arms = {}
    for arm, rounds in seen.items():
        by_turn = [flat([*of_turn]) for of_turn in zip(*rounds, strict=True)]
        every = flat(later[arm])
        arms[arm] = {
            "first_ms": percentiles_of(every),
            "hit_rate": round(hit_rate(every), 3),
            "by_turn": {
                "first_ms": [round(first_ms(answers), 1) for answers in by_turn],
                "hit_rate": [round(hit_rate(answers), 3) for answers in by_turn],
            },
        }
    return {"arms": arms, "spread_over_stay": results.spread(ratios, 3)}


def flat(turns: Turns) -> list[Answer]:
    return [*chain.from_iterable(turns)]


def first_ms(answers: list[Answer]) -> float:
    return median(answer.first_ms for answer in answers)


def percentiles_of(answers: list[Answer]) -> dict[str, float]:
    seen = percentiles([answer.first_ms for answer in answers])
    return {p: round(ms, 1) for p, ms in seen.items()}


def hit_rate(answers: list[Answer]) -> float:
    """Of what turns read, the share that was there."""
    cached = sum(answer.cached_tokens or 0 for answer in answers)
    return cached / sum(answer.prompt_tokens for answer in answers)

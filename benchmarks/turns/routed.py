"""A small request through Ray, and the same one to a server without it."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.servers import Target
from benchmarks.turns import asking
from benchmarks.turns.places import text

PROMPT = text("small", 8)
PERCENTILES = (50, 95)


@dataclass(frozen=True)
class Plan:
    at_once: tuple[int, ...]
    requests: int
    """Of each client in a round."""
    rounds: int


def measure(targets: dict[str, Target], plan: Plan) -> list[dict[str, Any]]:
    """Of two targets; the extra is the second one's."""
    for target in targets.values():
        round_of(target, max(plan.at_once), 1)
    return [row(targets, plan, clients) for clients in plan.at_once]


def row(targets: dict[str, Target], plan: Plan, clients: int) -> dict[str, Any]:
    seen: dict[str, list[dict[str, float]]] = {arm: [] for arm in targets}
    for arms in in_turns([*targets], plan.rounds):
        for arm in arms:
            seen[arm].append(percentiles(round_of(targets[arm], clients, plan.requests)))
    extra = [{p: b[p] - a[p] for p in a} for a, b in zip(*seen.values(), strict=True)]
    spreads = {arm: spread(rounds) for arm, rounds in (seen | {"extra": extra}).items()}
    return {"at_once": clients, "ms": spreads}


def in_turns(arms: list[str], rounds: int) -> list[list[str]]:
    """Each round begins where the last one ended."""
    return [arms[:: -1 if number % 2 else 1] for number in range(rounds)]


def round_of(target: Target, clients: int, requests: int) -> list[float]:
    """Milliseconds of each request."""
    body = {"model": target.model, "prompt": PROMPT, "max_tokens": 1}

    def one(_: int) -> list[float]:
        taken = []
        with asking.client(target) as http:
            http.get("models")  # that its connection is there
            for _ in range(requests):
                start = time.perf_counter()
                http.post("completions", json=body).raise_for_status()
                taken.append(1000 * (time.perf_counter() - start))
        return taken

    with ThreadPoolExecutor(clients) as pool:
        return [*chain.from_iterable(pool.map(one, range(clients)))]


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    ordered = sorted(milliseconds)
    return {f"p{p}": ordered[round((len(ordered) - 1) * p / 100)] for p in PERCENTILES}


def spread(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {p: results.spread([each[p] for each in rounds], 2) for p in rounds[0]}

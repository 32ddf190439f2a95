"""A server that is killed while it serves: what its clients saw committed is there, and no more.

KILLS=50 makes the short form long.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from tests.sessions.conftest import RedisServer

from .chats import (
    BUFFER,
    MAX_MODEL_LEN,
    MODEL,
    QUESTIONS,
    ByHand,
    ask,
    chat,
    first,
    get,
    limit,
    post,
    serving,
)
from .conftest import Server

KILLS = int(os.environ.get("KILLS", "1"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 120 * KILLS)]

CLIENTS = 12
TOKENS = 5
"""Of each answer."""


@pytest.fixture(params=["sqlite", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:{tmp_path / 'sessions.sqlite'}"
        return
    redis = RedisServer(tmp_path)
    yield redis.address
    redis.kill()


def kill(server: Server) -> None:
    """All processes of a server at once, as a machine does that loses power."""
    processes = [server.process, *server.process.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


@dataclass
class Client:
    """One that says the same as all others, and repeats a turn whose answer it did not get."""

    id: str
    turns: int = 0
    """That it saw answered."""
    answers: list[list[int]] = field(default_factory=list)

    def talk(self, server: Server, until: threading.Event) -> None:
        with suppress(httpx.HTTPError):
            while not until.is_set():
                self.turn(server)

    def turn(self, server: Server) -> None:
        question = f"Question {self.turns}?"
        body = chat(self.id, question, max_tokens=TOKENS, ignore_eos=True, return_token_ids=True)
        key = {"Idempotency-Key": str(self.turns)}
        response = post(server, "chat/completions", headers=key, **body)
        assert response.status_code == 200, response.text
        self.answers.append(response.json()["choices"][0]["token_ids"])
        self.turns += 1


def test_kills_under_load(speaker: Path, tmp_path: Path, address: str) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    clients = [Client(f"client:{i}") for i in range(CLIENTS)]
    positions: dict[int, int] = {}
    in_flight = 0
    for life in range(KILLS + 1):
        with serving(speaker, tmp_path, address) as server:
            for client in clients:
                shown = get(server, f"sessions/{client.id}")
                stands = shown.json()["turns"] if shown.status_code == 200 else 0
                assert stands in (client.turns, client.turns + 1), (seed, life, client)
                in_flight += stands > client.turns
                if stands:
                    position = positions.setdefault(stands, shown.json()["position"])
                    assert shown.json()["position"] == position, (seed, life, client)
            over = threading.Event()
            with ThreadPoolExecutor(CLIENTS) as pool:
                talks = [pool.submit(client.talk, server, over) for client in clients]
                time.sleep(chance.uniform(0.5, 4))
                if life < KILLS:
                    kill(server)
                over.set()
            for talk in talks:
                talk.result()
    most = max(clients, key=lambda client: client.turns)
    assert most.turns > KILLS
    for client in clients:
        assert client.answers == most.answers[: client.turns]
    print(f"{KILLS} kills, {sum(c.turns for c in clients)} turns, {in_flight} committed in flight")


def test_a_restart_between_turns(
    speaker: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, address: str
) -> None:
    """A server that is killed between some turns, with a pool in which no turn finds its buffer."""
    with Restarting(lambda: serving(speaker, tmp_path, address, **SMALL_POOL)) as restarting:
        by_hand = ByHand(restarting.server, tokenizer, BUFFER)
        misses = 0
        kills = {len(QUESTIONS) * (i + 1) // (KILLS + 1) for i in range(KILLS)}
        for turn, question in enumerate(QUESTIONS):
            if turn in kills:
                restarting.kill()
                by_hand.server = restarting.server
            expected = by_hand.ask(question, limit(turn))
            fill_pool(restarting.server)
            new: Any = question if turn else first(question)
            answer = ask(
                restarting.server, "one", new, max_tokens=limit(turn), return_token_ids=True
            )
            assert answer["choices"][0]["token_ids"] == expected
            misses += answer["usage"]["prompt_tokens_details"]["cached_tokens"] <= FEW
        assert by_hand.compactions > 2
        assert misses == len(QUESTIONS)


FEW = 64
"""Cached tokens, of a turn that reads its buffer anew: what the pool keeps of its beginning."""
SMALL_POOL = {"num-gpu-blocks-override": 18, "max-num-seqs": 1}
"""Of one stream, as it is read."""


def fill_pool(server: Server) -> None:
    """Put a prompt that nobody said before where the blocks of all streams were."""
    prompt = random.sample(range(1000, 2000), MAX_MODEL_LEN - 1)
    response = post(server, "completions", model=MODEL, prompt=prompt, max_tokens=1)
    assert response.status_code == 200, response.text


class Restarting:
    """A server that is started again as often as it is killed."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self.start = start

    def __enter__(self) -> "Restarting":
        self.context = self.start()
        self.server: Server = self.context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    def kill(self) -> None:
        kill(self.server)
        self.context.__exit__(None, None, None)
        self.__enter__()

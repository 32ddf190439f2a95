"""Many sessions at once, on a pool for few of them.

SESSIONS=200 TURNS=10 makes the short form long.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_sink.geometry import Geometry

from .chats import BUFFER, ask, get, serving
from .conftest import Server, wait_for

pytestmark = pytest.mark.slow

BLOCK = 32
STREAMS = 20
"""That the pool holds."""
SESSIONS = int(os.environ.get("SESSIONS", "80"))
TURNS = int(os.environ.get("TURNS", "4"))
NULL_BLOCK = 1


@pytest.fixture(scope="module")
def server(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pool")
    blocks = STREAMS * Geometry(BUFFER.sinks, BUFFER.window).max_blocks(BLOCK) + NULL_BLOCK
    pool = {"num-gpu-blocks-override": blocks, "max-num-seqs": 64}
    with serving(speaker, folder, f"sqlite:{folder / 'sessions.sqlite'}", **pool) as running:
        yield running


def test_more_sessions_than_the_pool_holds(server: Server) -> None:
    """What each says is what it says alone."""

    def talk(session: int, name: str = "session") -> list[list[int]]:
        said = []
        for turn in range(TURNS):
            question = f"Question {turn} of {session}: why is light so?"
            answer = ask(server, f"{name}:{session}", question, return_token_ids=True)
            said.append(answer["choices"][0]["token_ids"])
        return said

    with ThreadPoolExecutor(SESSIONS) as pool:
        said = list(pool.map(talk, range(SESSIONS)))
    shown = [get(server, f"sessions/session:{session}").json() for session in range(SESSIONS)]
    assert {one["turns"] for one in shown} == {TURNS}
    assert server.metric("vllm:num_preemptions_total") == 0
    assert server.metric("vllm_sink:session_misses_total") > SESSIONS // 4
    wait_for(lambda: server.metric("vllm_sink:kv_blocks_held") == 0, timeout=10)
    for session in range(0, SESSIONS, SESSIONS // 8):
        assert talk(session, "alone") == said[session]

import asyncio
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from benchmarks.sessions import PLAN, QUICK
from benchmarks.turns import commits, idle, places, resending
from benchmarks.turns.asking import Answer, RefusedError, ask
from vllm_sink.buffer import Buffer
from vllm_sink.sessions.sqlite import SqliteStore

PLACES = places.Plan(Buffer(2, 6, 32), positions=(60, 500), rounds=3, question=4, piece=100)


@pytest.mark.parametrize("plan", [PLAN.position, PLAN.times, QUICK.position, PLACES])
def test_turns_take_a_session_to_its_place(plan: places.Plan) -> None:
    assert plan.buffered[1] + plan.question + plan.answer == plan.buffer.mark - 1
    for position in plan.positions:
        for buffered in plan.buffered:
            held: list[int] = []
            for turn in plan.turns(position, buffered):
                held = plan.buffer.extended([*held, *[0] * (turn - 1)], [0])
                assert turn <= plan.piece
            assert len(held) == buffered
            assert sum(plan.turns(position, buffered)) == position


def test_places_are_compared_turn_by_turn() -> None:
    both = [places.Place(httpx.Client(), PLACES, position, 8) for position in PLACES.positions]
    times = [(1.0, 2.0), (4.0, 4.0), (2.0, 8.0)]
    cached = [(10, 12), (10, None), (11, 12)]
    rounds = [
        [Answer(first_ms, 12, tokens, "") for first_ms, tokens in zip(*each, strict=True)]
        for each in zip(times, cached, strict=True)
    ]
    row = places.row(both, "hit", rounds)
    assert row["ratios"] == [{"min": 1.0, "median": 2.0, "max": 4.0}]
    assert [place["computed_tokens"] for place in row["places"]] == [2, 12]
    assert [place["first_ms"]["median"] for place in row["places"]] == [2.0, 4.0]


def arm(*first_ms: float) -> dict[str, Any]:
    return {"turns": [{"first_ms": each} for each in first_ms], "refusal": None}


def test_histories_are_compared_while_all_answer() -> None:
    plan = resending.Plan(Buffer(2, 6, 32), turns=5, question=4, answer=4, stretch=2)
    arms = {"session": arm(9, 1, 1, 2, 1), "dense": arm(9, 1, 3, 4)}
    found = resending.over_session(plan, arms)
    assert found["until_turn"] == 4
    dense = found["arms"]["dense"]
    assert dense == {"ratio": {"min": 2.0, "median": 2.5, "max": 3.0}, "last_over_first": 1.75}
    assert found["arms"]["session"]["ratio"]["median"] == 1.0


class Streaming(BaseHTTPRequestHandler):
    """An answer of two tokens, or what a body asks for instead."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        error = {"error": {"message": "too long"}}
        self.send_response(body["status"])
        self.end_headers()
        if body["status"] != 200:
            self.wfile.write(json.dumps(error).encode())
            return
        chunks: list[Any] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        chunks += [{"choices": [{"delta": {"content": text}}]} for text in ("Li", "ght")]
        details = {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}
        chunks.append(error if body["breaks"] else {"choices": [], "usage": details})
        for chunk in chunks:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with HTTPServer(("127.0.0.1", 0), Streaming) as server:
        Thread(target=server.serve_forever).start()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}/v1") as client:
            yield client
        server.shutdown()


def test_an_answer_is_timed_and_read(client: httpx.Client) -> None:
    answer = ask(client, "chat/completions", status=200, breaks=False)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.text) == (7, 3, "Light")
    assert answer.first_ms > 0


@pytest.mark.parametrize(("status", "breaks"), [(400, False), (200, True)])
def test_refusals_are_told(client: httpx.Client, status: int, breaks: bool) -> None:
    with pytest.raises(RefusedError, match="too long"):
        ask(client, "completions", status=status, breaks=breaks)


def test_percentiles() -> None:
    milliseconds = [place / 1000 for place in range(101)]
    assert commits.percentiles(milliseconds) == {"p50": 50.0, "p99": 99.0}
    assert commits.percentiles([0.002]) == {"p50": 2.0, "p99": 2.0}


def test_stores_take_turns(tmp_path: Path) -> None:
    address = f"sqlite:{tmp_path / 'sessions'}"
    seen = asyncio.run(commits.take_turns(address, [*range(500)], buffered=8, tasks=3, seconds=0.2))
    assert seen["turns_s"] > 0

    async def turns() -> list[int]:
        store = SqliteStore(tmp_path / "sessions")
        heads = await store.list("", "", 9)
        await store.close()
        return [head.turn for head in heads]

    assert len(asyncio.run(turns())) == 3


def test_rows_are_as_the_store_writes_them(tmp_path: Path) -> None:
    plan = idle.Plan(Buffer(2, 6, 32), sessions=(3,), calls=1)
    text = [*range(500)]
    idle.fill(tmp_path / "filled", plan.rows(3, text))

    async def read() -> None:
        store = SqliteStore(tmp_path / "filled")
        for session in plan.rows(3, text):
            found = await store.get("", session.id)
            assert found is not None
            assert found.tokens == session.tokens
        assert (await store.usage("")).sessions == 3
        await store.close()

    asyncio.run(read())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quick_resumes(quick: Callable[[str], Any]) -> None:
    written = quick("sessions")
    for row in written["position"] + written["times"]:
        for place in row["places"]:
            misses = row["kind"] == "miss"
            assert (place["computed_tokens"] == place["read_tokens"]) == misses
            assert place["computed_tokens"] <= QUICK.position.buffer.mark
    arms = written["histories"]["arms"]
    assert set(arms) == set(resending.ARMS)
    for seen in arms.values():
        assert len(seen["turns"]) == QUICK.histories.turns
        assert seen["refusal"] is None
    for row in written["stores"]["rows"]:
        assert row["turns_s"] > 0
        assert 0 < row["commit_ms"]["p50"] <= row["commit_ms"]["p99"]
    (row,) = written["idle"]["sqlite"]
    assert min(row["front_end_mib"], row["engine_mib"]) > 0
    assert written["idle"]["redis"][0]["bytes_a_session"] > 0
    again = quick("sessions")
    assert {name: again[name] for name in written if name != "machine"} == {
        name: written[name] for name in written if name != "machine"
    }

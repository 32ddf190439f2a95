"""A session of a server whose model is split over two workers, beside one of a single worker."""

from pathlib import Path
from typing import Any

import pytest

from .chats import BUFFER, QUESTIONS, ask, first, get, limit, serving
from .conftest import Server

pytestmark = pytest.mark.slow

ID = "ada"
TURNS = 10


def conversation(server: Server) -> dict[str, Any]:
    """What comes of turns past the mark: tokens of the model, and what the server tells of them."""
    turns = []
    for turn, question in enumerate(QUESTIONS[:TURNS]):
        said = question if turn else first(question)
        answer = ask(server, ID, said, max_tokens=limit(turn), return_token_ids=True)
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        turns.append((answer["choices"][0]["token_ids"], cached))
    shown = get(server, f"sessions/{ID}").json()
    counted = {name: shown[name] for name in ("position", "buffered_tokens", "resident_tokens")}
    compactions = server.metric("vllm_sink:compactions_total")
    return {"turns": turns, "compactions": compactions, **counted}


def test_two_workers_keep_a_session_as_one(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without it, vLLM 0.32 may bind both workers to the same cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    kept = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        flags = {"tensor-parallel-size": workers, "distributed-executor-backend": "mp"}
        with serving(speaker, folder, f"sqlite:{folder}/sessions.sqlite", **flags) as server:
            kept.append(conversation(server))
    alone, together = kept
    assert together == alone
    assert together["position"] > BUFFER.mark > together["buffered_tokens"]
    assert together["resident_tokens"] > 0

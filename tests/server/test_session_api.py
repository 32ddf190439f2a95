"""Whatever is asked of sessions is answered, and leaves nothing behind: by schemathesis."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import venvs

from .chats import KEY, MODEL, delete, get, post, serving
from .conftest import Server, wait_for

pytestmark = pytest.mark.slow

SECONDS = 90
"""That it makes up requests."""
HOOKS = Path(__file__).with_name("session_cases.py")
SPEAKING = {
    "chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "completions": {"prompt": "Hello"},
}


@pytest.fixture(scope="module")
def server(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("api")
    with serving(speaker, folder, f"sqlite:{folder / 'sessions.sqlite'}") as running:
        yield running


def requested(server: Server, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Requests and what became of them, as HAR has them."""
    report = folder / "requests.har"
    command = [*venvs.isolated("clients"), "-m", "schemathesis.cli", "run"]
    command += [f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"]
    command += ["--include-path-regex", r"^/v1/(sessions|(chat/)?completions$)"]
    command += ["--phases", "coverage,fuzzing", "--suppress-health-check", "all"]
    command += [f"--seed={seed}", f"--max-time={SECONDS}", "--max-examples=100"]
    command += ["--checks=not_a_server_error", "--request-timeout=60", "--continue-on-failure"]
    command += ["--generation-database=none", "--report=har", f"--report-har-path={report}"]
    told = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS), "MODEL": MODEL},
        text=True,
        capture_output=True,
        timeout=SECONDS + 120,
    )
    print(told.stdout, told.stderr)
    assert told.returncode in (0, 1)
    entries: list[dict[str, Any]] = json.loads(report.read_text())["log"]["entries"]
    return entries


def fails_without_sessions(server: Server, request: dict[str, Any]) -> bool:
    path = request["url"].partition("/v1/")[2]
    body = json.loads(request["postData"]["text"])
    return path in SPEAKING and post(server, path, **body | {"session_id": None}).is_server_error


@pytest.mark.timeout(SECONDS + 300)
def test_requests_that_nobody_thought_of(server: Server, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"{seed=}")
    entries = requested(server, tmp_path, seed)
    answered = set()
    for entry in entries:
        request, status = entry["request"], entry["response"]["status"]
        assert status, f"no answer to {request}"
        assert status < 500 or fails_without_sessions(server, request), request
        path = request["url"].partition("/v1/")[2].partition("?")[0]
        answered.add((request["method"], path.partition("/")[0], status))
    # It came as far as that.
    expected = {("POST", "chat"), ("POST", "completions"), ("POST", "sessions")}
    expected |= {("GET", "sessions"), ("DELETE", "sessions")}
    assert expected <= {(method, path) for method, path, status in answered if status == 200}
    # No turn is under way.
    for path, said in SPEAKING.items():
        for number in range(2):
            id = f"{path.partition('/')[0].removesuffix('s')}{number}"
            assert delete(server, f"sessions/{id}").status_code in (200, 404)
            turn = {"model": MODEL, "session_id": id, "max_tokens": 4} | said
            assert post(server, path, **turn).status_code == 200
            assert get(server, f"sessions/{id}").json()["turns"] == 1
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, timeout=30)
    assert server.metric("vllm_sink:kv_blocks_held") == 0

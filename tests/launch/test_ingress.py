import json
from typing import Any

import pytest
from starlette.requests import Request

from launch.ingress import session_of


@pytest.mark.parametrize(
    ("path", "headers", "body", "session"),
    [
        ("/v1/chat/completions", {}, {"session_id": "a"}, "a"),
        ("/v1/chat/completions", {"X-Session-ID": "b"}, {"messages": []}, "b"),
        ("/v1/chat/completions", {"X-Session-ID": "b"}, {"session_id": "a"}, "a"),
        ("/v1/chat/completions", {"X-Session-ID": "b"}, {"session_id": ""}, "b"),
        ("/v1/chat/completions", {}, {"vllm_xargs": {"session_id": "c"}}, "c"),
        ("/v1/chat/completions", {"X-Session-ID": "b"}, {"vllm_xargs": {"session_id": "c"}}, "b"),
        ("/v1/chat/completions", {}, {"vllm_xargs": ["session_id"]}, None),
        ("/v1/chat/completions", {}, {"session_id": 3}, None),
        ("/v1/chat/completions", {}, {"session_id": "\ud800"}, None),
        ("/v1/chat/completions", {}, {"session_id": "a b"}, None),
        ("/v1/chat/completions", {}, {}, None),
        ("/v1/chat/completions", {}, ["session_id"], None),
        ("/v1/sessions", {}, None, None),
        ("/v1/sessions/a", {}, None, "a"),
        ("/v1/sessions/a/fork", {"X-Session-ID": "c"}, {"session_id": "b"}, "a"),
    ],
)
def test_the_session_of_a_request(
    path: str, headers: dict[str, str], body: Any, session: str | None
) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "root_path": "", "query_string": b"", "headers": raw}
    assert session_of(Request(scope), b"" if body is None else json.dumps(body).encode()) == session


def test_a_body_that_is_no_json_is_for_the_server_to_refuse() -> None:
    scope = {"type": "http", "path": "/v1/completions", "root_path": "", "headers": []}
    for body in (b"\xff{", b"[" * 200_000):
        assert session_of(Request(scope), body) is None

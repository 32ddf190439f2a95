"""What a session takes an answer to be, where a parser of vLLM's reads it."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_sink.sessions.handlers import ChatHandler


class Parser:
    def parse(self, text: str, *_: Any, **__: Any) -> Any:
        calls = [SimpleNamespace(name=name, arguments="{}") for name in text.split()]
        return "Hm.", None, calls or None


def handler(**attributes: Any) -> Any:
    nothing = lambda *_: None  # noqa: E731
    return SimpleNamespace(
        create_chat_completion=nothing,
        render_chat_request=nothing,
        parser_cls=Parser,
        _make_parser=lambda *_: Parser(),
        _effective_chat_template_kwargs=nothing,
        renderer=SimpleNamespace(tokenizer=None),
        enable_auto_tools=True,
        **attributes,
    )


@pytest.mark.parametrize(
    ("text", "parallel", "called"),
    [("", None, []), ("f g", None, ["f", "g"]), ("f g", True, ["f", "g"]), ("f g", False, ["f"])],
)
def test_of_an_answer_counts_what_its_client_sees(
    text: str, parallel: bool | None, called: list[str]
) -> None:
    chats = ChatHandler(handler(), SimpleNamespace(engine=None))
    message = chats.said(SimpleNamespace(parallel_tool_calls=parallel))(text, [])
    assert message["content"] is None
    assert [call["function"]["name"] for call in message["tool_calls"]] == called

import asyncio
from argparse import Namespace
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import State

from vllm_sink.server.answers import NO_END, forgetful, set_default, set_up

CONTEXT = 256


@pytest.mark.parametrize(
    ("asked", "of_the_model", "expected"),
    [
        (None, {}, {"max_tokens": CONTEXT}),
        (None, {"max_tokens": 7}, {"max_tokens": 7}),
        (9, {}, {"max_tokens": 9}),
        (9, {"max_tokens": 7}, {"max_tokens": 9}),
        (0, {}, {}),
        (0, {"max_tokens": 7, "top_k": 2}, {"top_k": 2}),
    ],
    ids=str,
)
def test_the_user_comes_first_then_the_model(
    asked: int | None, of_the_model: dict[str, Any], expected: dict[str, Any]
) -> None:
    parameters = dict(of_the_model)
    set_default(parameters, Namespace(default_max_tokens=asked, trained_context=CONTEXT))
    assert parameters == expected


def state_of(sink: dict[str, Any], enable_log_outputs: bool = False) -> State:
    """As vLLM's `init_app_state` leaves it, of what matters here."""
    config = SimpleNamespace(max_model_len=1024)
    renderer = SimpleNamespace(model_config=config)
    handler = SimpleNamespace(
        default_sampling_params={},
        model_config=config,
        online_renderer=renderer,
        enable_log_outputs=enable_log_outputs,
        chat_completion_stream_generator=talk,
    )
    args = Namespace(
        additional_config={"sink": sink}, default_max_tokens=None, trained_context=CONTEXT
    )
    return State({"args": args, "chat": handler, "renderer": renderer, "other": object()})


async def talk(words: list[str], kept: list[list[str]]) -> AsyncGenerator[str, None]:
    previous_texts = [""]
    kept.append(previous_texts)
    for word in words:
        previous_texts[0] += word
        yield word


@pytest.mark.parametrize(
    ("sink", "length"),
    [
        ({"window_tokens": 60}, NO_END),
        ({"window_tokens": 60, "policy": "full"}, 1024),
        ({"window_tokens": 60, "reindex": False}, 1024),
        ({"window_tokens": 1020}, 1024),
    ],
    ids=str,
)
def test_answers_are_as_long_as_streams_can_be(sink: dict[str, Any], length: int) -> None:
    state = state_of(sink)
    engines_own = state.chat.model_config
    set_up(state)
    assert state.chat.model_config.max_model_len == length
    assert state.renderer.model_config.max_model_len == length
    assert engines_own.max_model_len == 1024
    assert state.chat.default_sampling_params == {"max_tokens": CONTEXT}


@pytest.mark.parametrize("logged", [False, True])
def test_a_chat_keeps_its_text_for_the_log_alone(logged: bool) -> None:
    state = state_of({"window_tokens": 60}, enable_log_outputs=logged)
    set_up(state)
    kept: list[list[str]] = []

    async def listen() -> list[str]:
        chunks = state.chat.chat_completion_stream_generator(["a", "b", "c"], kept)
        return [chunk async for chunk in chunks]

    assert asyncio.run(listen()) == ["a", "b", "c"]
    assert kept == [["abc" if logged else ""]]


def test_a_chat_that_is_left_is_closed() -> None:
    closed = []

    async def chunks() -> AsyncGenerator[str, None]:
        previous_texts = [""]
        try:
            while True:
                previous_texts[0] += "word"
                yield "word"
        finally:
            closed.append(True)

    async def leave() -> None:
        stream: Any = forgetful(chunks)()
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    assert closed == [True]

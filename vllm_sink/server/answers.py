"""How long answers get: as long as their requests say, in streams that have no end of their own.

vLLM cuts a request's `max_tokens` to what its model's context leaves of it, lets an answer without
a limit run as far, and its chat handler keeps all text that it has sent.
"""

from argparse import Namespace
from collections.abc import Callable
from contextlib import aclosing
from copy import copy
from functools import wraps
from types import AsyncGeneratorType
from typing import Any

from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_sink.plugin.requests import NO_END
from vllm_sink.settings import SinkSettings

Chunks = Callable[..., AsyncGeneratorType[str, None]]


class EndlessAnswers:
    """ASGI middleware that, as the server starts, sets up vLLM's request handlers.

    What they go by is in their attributes: defaults of what a request leaves open in
    `default_sampling_params`, lengths in `model_config` (`get_max_tokens`,
    vllm/entrypoints/serve/utils/api_utils.py). The engine has a config of its own, by which it
    refuses a prompt that is too long. `--override-generation-config` would be a limit for all.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            set_up(scope["app"].state)
        await self.app(scope, receive, send)


def set_up(state: State) -> None:
    settings = SinkSettings.parse(state.args.additional_config["sink"])
    handlers = [state[name] for name in state if hasattr(state[name], "default_sampling_params")]
    for handler in handlers:
        set_default(handler.default_sampling_params, state.args)
        if not settings.buffer(handler.model_config.max_model_len):
            continue
        handler.model_config = without_end(handler.model_config)
        handler.online_renderer.model_config = without_end(handler.online_renderer.model_config)
        if hasattr(handler, "chat_completion_stream_generator") and not handler.enable_log_outputs:
            chunks = handler.chat_completion_stream_generator
            handler.chat_completion_stream_generator = forgetful(chunks)


def set_default(parameters: dict[str, Any], args: Namespace) -> None:
    """The user's default, 0 being no end, or else the model's, or else the trained context."""
    if args.default_max_tokens is None:
        parameters.setdefault("max_tokens", args.trained_context)
    elif args.default_max_tokens:
        parameters["max_tokens"] = args.default_max_tokens
    else:
        parameters.pop("max_tokens", None)


def without_end(model_config: Any) -> Any:
    """The same, for who asks it how long a stream may get."""
    endless = copy(model_config)
    endless.max_model_len = NO_END
    return endless


def forgetful(chunks: Chunks) -> Chunks:
    """A chat's stream that does not keep its text, which vLLM's keeps for a line of its log.

    The text is in a local variable, so there is no other way to it. Were it kept only where output
    is logged, this would be unnecessary.
    """

    @wraps(chunks)
    async def stream(*args: Any, **kwargs: Any) -> Any:
        async with aclosing(chunks(*args, **kwargs)) as inner:
            async for chunk in inner:
                yield chunk
                if inner.ag_frame is not None:
                    texts = inner.ag_frame.f_locals["previous_texts"]
                    texts[:] = [""] * len(texts)

    return stream


NAME = f"{EndlessAnswers.__module__}.{EndlessAnswers.__name__}"

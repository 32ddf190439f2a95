"""How long an answer gets whose request names no limit.

vLLM lets it run to the end of the model's context, and here there is none.
"""

from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send


class DefaultMaxTokens:
    """ASGI middleware that, as the server starts, sets a default in vLLM's request handlers.

    Each handler keeps the defaults of what a request leaves open in `default_sampling_params`
    (`get_max_tokens`, vllm/entrypoints/serve/utils/api_utils.py). Those of the model's own
    generation config stay, and `--override-generation-config` is a limit for all requests, so
    neither is the place.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            state = scope["app"].state
            if state.args.default_max_tokens:
                set_default((state[name] for name in state), state.args.default_max_tokens)
        await self.app(scope, receive, send)


def set_default(handlers: Iterable[Any], max_tokens: int) -> None:
    for handler in handlers:
        if hasattr(handler, "default_sampling_params"):
            handler.default_sampling_params.setdefault("max_tokens", max_tokens)


NAME = f"{DefaultMaxTokens.__module__}.{DefaultMaxTokens.__name__}"

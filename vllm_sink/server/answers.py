"""How long an answer gets whose request names no limit.

vLLM lets it run to the end of the model's context, and here there is none.
"""

from argparse import Namespace
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send


class DefaultMaxTokens:
    """ASGI middleware that, as the server starts, sets a default in vLLM's request handlers.

    Each handler keeps the defaults of what a request leaves open in `default_sampling_params`
    (`get_max_tokens`, vllm/entrypoints/serve/utils/api_utils.py), at first those of the model's own
    generation config. `--override-generation-config` would be a limit for all requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            state = scope["app"].state
            for name in state:
                if hasattr(state[name], "default_sampling_params"):
                    set_default(state[name].default_sampling_params, state.args)
        await self.app(scope, receive, send)


def set_default(parameters: dict[str, Any], args: Namespace) -> None:
    """The user's default, 0 being no end, or else the model's, or else the trained context."""
    if args.default_max_tokens is None:
        parameters.setdefault("max_tokens", args.trained_context)
    elif args.default_max_tokens:
        parameters["max_tokens"] = args.default_max_tokens
    else:
        parameters.pop("max_tokens", None)


NAME = f"{DefaultMaxTokens.__module__}.{DefaultMaxTokens.__name__}"

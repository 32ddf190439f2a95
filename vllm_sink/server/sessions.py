"""How the server comes to have sessions: where they are kept, and the routes to them."""

import os
from argparse import Namespace
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path

from vllm import envs
from vllm.plugins import ENDPOINT_PLUGINS_GROUP

from vllm_sink.sessions import stores
from vllm_sink.sessions.errors import SessionError
from vllm_sink.sessions.routes import NAME
from vllm_sink.settings import SettingsError

NO_STORE = "none"
GROUPS = "vllm."
"""Entry point groups of vLLM begin so."""


def prepare(args: Namespace) -> None:
    """Complete `args` of the server in place; raises `SettingsError`, one sentence."""
    if args.session_store == NO_STORE or args.headless or args.runner == "pooling":
        return
    if args.session_store is None:
        path = default_path()
        # Where that fails, sessions alone are refused.
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        args.session_store = f"sqlite:{path}"
    try:
        stores.opened(args.session_store, args.session_ttl)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    allow_endpoints()


async def require_store(args: Namespace) -> None:
    """Raises `SettingsError`, one sentence, if the store that `args` name does not answer."""
    if args.session_store in (None, NO_STORE):
        return
    try:
        store = stores.opened(args.session_store, args.session_ttl)
        try:
            await store.usage("")
        finally:
            await store.close()
    except (ValueError, SessionError) as error:
        raise SettingsError(f"session_store: {error}") from None


def default_path() -> Path:
    """By the XDG Base Directory Specification, for state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "vllm_sink" / "sessions.sqlite"


def allow_endpoints() -> None:
    """vLLM loads what adds routes only where `VLLM_PLUGINS` names it, and then nothing else of what
    that leaves out: so the others are named too, where it was not set."""
    allowed = envs.VLLM_PLUGINS
    if allowed is None:
        others = (
            plugin.name
            for group in entry_points().groups
            if group.startswith(GROUPS) and group != ENDPOINT_PLUGINS_GROUP
            for plugin in entry_points(group=group)
        )
        allowed = list(dict.fromkeys(others))
    os.environ["VLLM_PLUGINS"] = ",".join([*allowed, NAME])

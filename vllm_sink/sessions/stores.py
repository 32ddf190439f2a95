"""Which store the setting `--session-store` names."""

from pathlib import Path

from vllm_sink.sessions.sqlite import SqliteStore
from vllm_sink.sessions.store import Store

ACCEPTED = "sqlite:PATH, redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix://PATH"


def opened(address: str, ttl: float | None) -> Store:
    """The store at `address`, which keeps sessions for `ttl` seconds, or None for ever.

    Raises:
        ValueError: no such store can be had, in one sentence that shows no password.
    """
    scheme, _, rest = address.partition(":")
    if scheme == "sqlite" and rest:
        return SqliteStore(Path(rest), ttl)
    shown = f"{scheme}:..." if "@" in address or "=" in address else address
    refusal = ValueError(f"--session-store is {shown!r}; accepted are {ACCEPTED}")
    if scheme not in ("redis", "rediss", "unix") or not rest.startswith("//"):
        raise refusal
    try:
        from vllm_sink.sessions.redis import RedisStore
    except ModuleNotFoundError:
        raise ValueError(
            f"--session-store is {shown!r}, which needs a package: pip install vllm-sink[redis]"
        ) from None
    try:
        return RedisStore(address, ttl)
    except ValueError:
        raise refusal from None

"""Methods of vLLM that have no seam, wrapped where they stand."""

from collections.abc import Callable
from functools import wraps
from typing import Any


def wrap(owner: type, method: str, around: Callable[..., Any]) -> None:
    """Have `around(original, self, ...)` called in a method's place; again is to no effect."""
    original = getattr(owner, method)
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, method, wrapped)

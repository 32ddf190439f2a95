"""Where what is made once a machine is kept."""

import os
from pathlib import Path


def folder() -> Path:
    """The project's folder in the user's cache; made if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vllm_sink")
    cache.mkdir(parents=True, exist_ok=True)
    return cache

"""One text at a time in real vLLM, for the likelihood of its tokens."""

from pathlib import Path
from typing import Any

from benchmarks.harness.engine import Worker

DTYPE = "float32"
CHUNK = 512
"""Tokens of a step: their log-probabilities over the vocabulary are held at once."""


def reader(model: str | Path, tokens: int, sink: dict[str, Any] | None = None) -> Worker:
    """An engine for texts of at most `tokens`; without settings for `sink` it is stock vLLM."""
    return Worker(
        model,
        dtype=DTYPE,
        max_model_len=tokens + 1,
        max_num_seqs=1,
        max_num_batched_tokens=CHUNK,
        additional_config={} if sink is None else {"sink": sink},
    )

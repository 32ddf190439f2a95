"""Real text as tokens."""

from pathlib import Path
from typing import Any

from benchmarks.texts import novels
from launch.book import book


def book_tokens(model: str | Path, count: int | None = None) -> list[int]:
    """The first `count` tokens, or all, of Newton's "Opticks", which comes with the engine."""
    return _tokens(model, book(), count)


def novel_tokens(model: str | Path, count: int | None = None) -> list[int]:
    """The first `count` tokens, or all, of Jane Austen's novels."""
    return _tokens(model, novels.text(), count)


def _tokens(model: str | Path, text: str, count: int | None) -> list[int]:
    """By the tokenizer of `model`; no special tokens."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens[:count]

"""Real text as tokens."""

from pathlib import Path
from typing import Any

from launch.book import book


def book_tokens(model: Path, count: int) -> list[int]:
    """The first `count` tokens of the book, by the tokenizer of `model`; no special tokens."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokens: list[int] = tokenizer(book(), add_special_tokens=False, verbose=False)["input_ids"]
    return tokens[:count]


def passages(tokens: list[int], count: int, length: int) -> list[list[int]]:
    """`count` passages of `length` tokens, evenly spread; they overlap where the text is short."""
    stride = (len(tokens) - length) // count
    return [tokens[i * stride : i * stride + length] for i in range(count)]

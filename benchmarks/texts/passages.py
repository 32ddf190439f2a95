"""Passages of a text: what many streams read, or one after another."""

import random
from itertools import islice

SEED = 0


def passages(tokens: list[int], count: int, length: int) -> list[list[int]]:
    """`count` passages of `length` tokens, evenly spread; they overlap where the text is short."""
    stride = (len(tokens) - length) // count
    return [tokens[i * stride : i * stride + length] for i in range(count)]


def draw(tokens: list[int], turns: list[int], length: int) -> list[list[list[int]]]:
    """Passages in random order for so many clients in each turn.

    So no prefix of one measurement is in the cache of the next.
    """
    every = passages(tokens, sum(turns), length)
    random.Random(SEED).shuffle(every)
    rest = iter(every)
    return [list(islice(rest, clients)) for clients in turns]

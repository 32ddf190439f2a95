"""What one core can do at best, and what a dense decoder's forward pass must do at least."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from benchmarks.harness.engine import end_with_parent, pin

BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Ceilings:
    """Of one core."""

    multiply_adds: float
    """A second, in a large matrix product."""
    bytes_read: float
    """A second, from memory."""


def ceilings(dtype: str) -> Ceilings:
    """Measured in a process of its own, on the core that the engines use."""
    with ProcessPoolExecutor(1, get_context("spawn"), _start) as pool:
        return pool.submit(_measure, dtype).result()


def _start() -> None:
    end_with_parent()
    pin()


def _measure(dtype: str) -> Ceilings:
    import torch

    torch.set_num_threads(1)
    size = 2048
    matrix = torch.randn(size, size, dtype=getattr(torch, dtype))
    block = torch.randn(2**26)
    return Ceilings(
        multiply_adds=size**3 / _fastest(lambda: matrix @ matrix),
        bytes_read=block.nbytes / _fastest(lambda: block.sum()),
    )


def _fastest(work: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(7))


@dataclass(frozen=True)
class Forward:
    """The forward pass of a Llama; `config` is its Hugging Face configuration."""

    config: Any
    bytes_a_number: int

    def multiply_adds(self, tokens: int) -> int:
        """To predict one token from `tokens` new ones; a query sees half of the keys on average."""
        c = self.config
        pairs = tokens * (tokens + 1) // 2
        attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
        return tokens * self._layers + attention + self._logits

    def bytes_read(self, cached: int) -> int:
        """To predict one token from `cached` keys and values."""
        c = self.config
        cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * cached
        return self.bytes_a_number * (self._layers + self._logits + cache)

    @property
    def _layers(self) -> int:
        """Weights of all layers' matrices."""
        c = self.config
        attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def _logits(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

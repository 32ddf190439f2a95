"""What an attention implementation is given, and what it must compute.

    out[t] = softmax over visible keys j of (score(t, j)) @ values

A window key is scored with the query as it is: both were rotated at stream positions, so their
distance is right. A sink is scored with the query turned back by the evicted count E(t), which
puts it at its distance in the cache (arXiv 2309.17453, section 3.2). One softmax covers both.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_sink.geometry import Geometry


@dataclass(frozen=True)
class KVCache:
    """One layer's paged cache; keys and values of token `i` of a block are `[block, :, i]`.

    Strides belong to the implementation that writes it.
    """

    keys: torch.Tensor
    """[blocks, kv_heads, block_size, head_size]"""
    values: torch.Tensor
    """[blocks, kv_heads, block_size, head_size]"""
    key_scale: torch.Tensor | None = None
    """[] float32: what a stored key is multiplied by; None for 1. The GPU's alone."""
    value_scale: torch.Tensor | None = None
    """Of values, alike."""


@dataclass(frozen=True)
class Batch:
    """The requests of one step and where their tokens lie. Tensors are int32."""

    query_start_loc: torch.Tensor
    """[requests + 1]: the first query of each request among the tokens of the step."""
    seq_lens: torch.Tensor
    """[requests]: tokens of each stream, the queries of this step included."""
    block_table: torch.Tensor
    """[requests, max_blocks]: entries of evicted blocks are never read."""
    max_query_len: int
    """The most queries that a request has in this step."""


@dataclass(frozen=True)
class Scoring:
    """How a layer scores a key."""

    scale: float
    soft_cap: float = 0.0
    """scores become `soft_cap * tanh(score / soft_cap)`; 0 for none."""
    alibi_slopes: torch.Tensor | None = None
    """[heads] float32, added as `slope * (key position - query position)`."""
    sink_logits: torch.Tensor | None = None
    """[heads] float32: learned sinks, each one more term in the denominator of its head's softmax,
    as gpt-oss has them; they take no soft cap."""
    reindex: bool = True
    """ALiBi sees sinks at their distance in the cache; false: in the stream."""


@dataclass(frozen=True)
class SinkTurn:
    """The rotation that brings a query from its stream position to its cache position."""

    rows: torch.Tensor
    """[tokens, rotary_dim] float32: cos and sin of -E(t) times each frequency."""
    is_neox_style: bool


class Attention(Protocol):
    """CPU, GPU and reference paths share this."""

    def as_cache(self, storage: torch.Tensor) -> KVCache:
        """View `storage` [blocks, kv_heads, block_size, 2 * head_size] as a cache."""

    def write(
        self, key: torch.Tensor, value: torch.Tensor, cache: KVCache, slots: torch.Tensor
    ) -> None:
        """Store `key` and `value` [tokens, kv_heads, head_size] at `slots` [tokens] int64.

        A slot is `block * block_size + offset`; vLLM pads with negative ones, which are skipped.
        """

    def attend(
        self,
        query: torch.Tensor,
        cache: KVCache,
        batch: Batch,
        geometry: Geometry,
        scoring: Scoring,
        turn: SinkTurn | None,
        out: torch.Tensor,
    ) -> None:
        """Write attention of `query` [tokens, heads, head_size] to `out` of the same shape.

        Tokens past `batch.query_start_loc[-1]` are padding and left alone. `turn` None: sinks keep
        their stream distance.
        """

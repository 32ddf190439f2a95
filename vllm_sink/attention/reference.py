"""Section 3.2 of arXiv 2309.17453 in plain PyTorch: any device, any dtype, meant to be read.

Scores are computed in float32, or in float64 for a float64 query.
"""

from collections.abc import Iterator

import torch

from vllm_sink.attention.interface import Batch, KVCache, Scoring, SinkTurn
from vllm_sink.geometry import Geometry
from vllm_sink.rotary import rotate

QUERIES_AT_ONCE = 256
"""Bounds the score matrix of a long prefill."""


class ReferenceAttention:
    """An `Attention` without a kernel, and the portable path where none can be built."""

    def as_cache(self, storage: torch.Tensor) -> KVCache:
        keys, values = storage.chunk(2, dim=-1)
        return KVCache(keys, values)

    def write(
        self, key: torch.Tensor, value: torch.Tensor, cache: KVCache, slots: torch.Tensor
    ) -> None:
        kept = slots >= 0
        block_size = cache.keys.shape[2]
        block, offset = slots[kept] // block_size, slots[kept] % block_size
        cache.keys[block, :, offset] = key[kept]
        cache.values[block, :, offset] = value[kept]

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
        query = query[: batch.query_start_loc[-1]]
        sink_query = rotate(query, turn.rows, turn.is_neox_style) if turn else query
        for tokens, t, block_row in _chunks(batch):
            out[tokens] = _attend_one_stream(
                query[tokens], sink_query[tokens], t, cache, block_row, geometry, scoring
            )


def _chunks(batch: Batch) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Tokens of one stream at a time, their stream positions, and their row of the block table."""
    starts = batch.query_start_loc.tolist()
    for request, seq_len in enumerate(batch.seq_lens.tolist()):
        stop = starts[request + 1]
        for first in range(starts[request], stop, QUERIES_AT_ONCE):
            last = min(first + QUERIES_AT_ONCE, stop)
            t = torch.arange(seq_len - (stop - first), seq_len - (stop - last))
            yield slice(first, last), t.to(batch.seq_lens.device), batch.block_table[request]


def _attend_one_stream(
    query: torch.Tensor,
    sink_query: torch.Tensor,
    t: torch.Tensor,
    cache: KVCache,
    block_row: torch.Tensor,
    geometry: Geometry,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention of one stream's `query` [n, heads, head_size] at positions `t` [n]."""
    first, last = int(t[0]), int(t[-1])
    sinks = torch.arange(min(geometry.sinks, geometry.window_start(last)), device=t.device)
    window = torch.arange(geometry.window_start(first), last + 1, device=t.device)

    window_start = (t + 1 - geometry.window).clamp(min=0)
    evicted = (t + 1 - geometry.window - geometry.sinks).clamp(min=0)
    sinks_seen = sinks < window_start[:, None]
    window_seen = (window >= window_start[:, None]) & (window <= t[:, None])

    sink_scores = _scores(
        sink_query,
        _gather(cache.keys, block_row, sinks),
        scoring,
        distance=sinks - (t - evicted if scoring.reindex else t)[:, None],
    )
    window_scores = _scores(
        query, _gather(cache.keys, block_row, window), scoring, distance=window - t[:, None]
    )
    scores = torch.cat((sink_scores, window_scores), dim=-1)
    seen = torch.cat((sinks_seen, window_seen), dim=-1)
    weights = _softmax(scores.masked_fill(~seen, -torch.inf), scoring)
    values = _gather(cache.values, block_row, torch.cat((sinks, window)))
    return _heads_last(weights @ values.to(weights.dtype)[:, None]).to(query.dtype)


def _gather(paged: torch.Tensor, block_row: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Tokens at stream `positions` [k] of one stream: [kv_heads, k, head_size]."""
    block_size = paged.shape[2]
    blocks = block_row[positions // block_size].long()
    return paged[blocks, :, positions % block_size].transpose(0, 1)


def _scores(
    query: torch.Tensor, keys: torch.Tensor, scoring: Scoring, distance: torch.Tensor
) -> torch.Tensor:
    """[kv_heads, queries a kv_head, n, k] of `query` [n, heads, d] and `keys` [kv_heads, k, d]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    kv_heads = keys.shape[0]
    grouped = query.to(dtype).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    scores = grouped @ keys.to(dtype)[:, None].transpose(-1, -2) * scoring.scale
    if scoring.soft_cap:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    if scoring.alibi_slopes is not None:
        slopes = scoring.alibi_slopes.to(dtype).view(kv_heads, -1, 1, 1)
        scores = scores + slopes * distance
    return scores


def _softmax(scores: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Of `scores` [kv_heads, queries a kv_head, n, k], with what learned sinks take away."""
    if scoring.sink_logits is None:
        return scores.softmax(dim=-1)
    logits = scoring.sink_logits.to(scores.dtype).view(*scores.shape[:2], 1, 1)
    learned = logits.expand(*scores.shape[:3], 1)
    return torch.cat((scores, learned), dim=-1).softmax(dim=-1)[..., :-1]


def _heads_last(grouped: torch.Tensor) -> torch.Tensor:
    """[kv_heads, queries a kv_head, n, d] to [n, heads, d]."""
    return grouped.permute(2, 0, 1, 3).flatten(1, 2)

"""The GPU kernel: sinks and window of a paged KV cache in one pass, with one online softmax.

A program is a tile of queries of one stream under one KV head, the heads of its group packed into
the tile's rows, and one split of their window. It scores the sinks with the query turned back by
E(t), then its share of the window with the query as it is. It begins at the window's first key, so
that neither time nor memory depend on the position in the stream, and never reads what the block
table holds for the freed middle. Splits are merged by their log-sum-exp.
"""

from dataclasses import dataclass
from math import e, log2

import torch
import triton
import triton.language as tl

from vllm_sink.attention.interface import Batch, KVCache, Scoring, SinkTurn
from vllm_sink.geometry import Geometry, cdiv

LOG2_E = tl.constexpr(log2(e))
LEAST_ROWS = 16
"""Of a tile: what tensor cores multiply at once."""
QUERY_TILE_BYTES = 2**15
KEY_TILE_BYTES = 2**14
"""And of values: several are on their way into shared memory at a time."""
MOST_SPLITS = 16
PROGRAMS_A_PROCESSOR = 2
"""Fewer programs than this leave streaming multiprocessors without work to hide memory behind."""


@triton.jit
def _request_of(tile, query_start_loc, requests, TILE_QUERIES: tl.constexpr):
    """The request whose queries a tile holds.

    Request i has its first tile at `query_start_loc[i] // TILE_QUERIES + i`: there is room for a
    tile that is not full at the end of every request before it.
    """
    low = 0
    high = requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // TILE_QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _fold(
    query,
    top,
    total,
    out,
    j,
    loaded,
    seen,
    distance,
    slopes,
    keys,
    values,
    block_row,
    key_block_stride,
    key_token_stride,
    value_block_stride,
    value_token_stride,
    scale,
    soft_cap,
    ALIBI: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the keys at stream positions `j` into a running softmax in base 2.

    query [rows, head]; top, total [rows]; out [rows, head]; j, loaded [keys]: what lies in no block
    of the stream is not loaded; seen, distance [rows, keys]; slopes [rows].
    """
    dim = tl.arange(0, HEAD_PADDED)
    in_head = dim < HEAD_SIZE
    block = tl.load(block_row + j // BLOCK_SIZE, mask=loaded, other=0).to(tl.int64)
    offset = j % BLOCK_SIZE
    key_at = block * key_block_stride + offset * key_token_stride
    key = tl.load(
        keys + key_at[None, :] + dim[:, None],
        mask=loaded[None, :] & in_head[:, None],
        other=0.0,
    ).to(query.dtype)
    score = tl.dot(query, key, input_precision=PRECISION) * scale
    if SOFT_CAP:
        # tanh, which has no name that GPUs and the interpreter share.
        score = soft_cap - 2 * soft_cap / (tl.exp2(score * (2 / soft_cap) * LOG2_E) + 1)
    if ALIBI:
        score += slopes[:, None] * distance
    score = tl.where(seen, score * LOG2_E, float("-inf"))

    new_top = tl.maximum(top, tl.max(score, axis=1))
    # A row may have seen nothing yet, and -inf - -inf is NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weight, axis=1)
    value_at = block * value_block_stride + offset * value_token_stride
    value = tl.load(
        values + value_at[:, None] + dim[None, :],
        mask=loaded[:, None] & in_head[None, :],
        other=0.0,
    ).to(query.dtype)
    out = out * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
    return new_top, total, out


@triton.jit(do_not_specialize=["requests"])
def _attend(
    out,
    lse,
    query,
    keys,
    values,
    key_scale,
    value_scale,
    query_start_loc,
    seq_lens,
    block_table,
    turn,
    alibi_slopes,
    sink_logits,
    requests,
    scale,
    soft_cap,
    query_stride,
    query_head_stride,
    block_table_stride,
    key_block_stride,
    key_head_stride,
    key_token_stride,
    value_block_stride,
    value_head_stride,
    value_token_stride,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    REINDEX: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DECODE: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SINK_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: tiles, KV heads, splits.

    query, out [tokens, heads, head]; turn [tokens, rotary_dim], key_scale and value_scale [],
    alibi_slopes and sink_logits [heads], each float32 or None. With splits, out is
    [tokens, heads, splits, head_padded] float32, weighed by lse [tokens, heads, splits], base 2.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    ALIBI: tl.constexpr = alibi_slopes is not None

    if DECODE:
        request = tile
        first_query = 0
    else:
        request = _request_of(tile, query_start_loc, requests, TILE_QUERIES)
        first_tile = tl.load(query_start_loc + request) // TILE_QUERIES + request
        first_query = (tile - first_tile) * TILE_QUERIES
    start = tl.load(query_start_loc + request)
    queries = tl.load(query_start_loc + request + 1) - start
    if first_query >= queries:
        return
    first_t = tl.load(seq_lens + request) - queries + first_query
    last_t = first_t + tl.minimum(TILE_QUERIES, queries - first_query) - 1

    row = tl.arange(0, TILE_ROWS)
    dim = tl.arange(0, HEAD_PADDED)
    in_head = dim < HEAD_SIZE
    t = first_t + row // GROUP
    token = (start + first_query + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    in_tile = (row < TILE_QUERIES * GROUP) & (t <= last_t)
    query_row = query + token * query_stride + head * query_head_stride
    own = in_tile[:, None] & in_head[None, :]
    plain = tl.load(query_row[:, None] + dim[None, :], mask=own, other=0.0)
    if key_scale is not None:
        scale *= tl.load(key_scale)
    slopes = tl.zeros([TILE_ROWS], tl.float32)
    if ALIBI:
        slopes = tl.load(alibi_slopes + head, mask=in_tile, other=0.0)

    block_row = block_table + request.to(tl.int64) * block_table_stride
    keys += kv_head * key_head_stride
    values += kv_head * value_head_stride
    top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    if sink_logits is not None and split == 0:
        top = tl.load(sink_logits + head, mask=in_tile, other=0.0) * LOG2_E
        total = tl.full([TILE_ROWS], 1.0, tl.float32)
    sums = tl.zeros([TILE_ROWS, HEAD_PADDED], tl.float32)
    window_start = tl.maximum(t + 1 - WINDOW, 0)

    if SINKS > 0 and split == 0:
        sinks = tl.minimum(SINKS, tl.maximum(last_t + 1 - WINDOW, 0))
        if sinks > 0:
            turned = plain
            if turn is not None:
                # Dimension i is turned with its partner; cos | sin lie side by side.
                HALF: tl.constexpr = ROTARY_DIM // 2
                if NEOX:
                    leads = dim < HALF
                    partner = tl.where(leads, dim + HALF, dim - HALF)
                    angle = tl.where(leads, dim, dim - HALF)
                else:
                    leads = dim % 2 == 0
                    partner = tl.where(leads, dim + 1, dim - 1)
                    angle = dim // 2
                rotated = in_tile[:, None] & (dim < ROTARY_DIM)[None, :]
                turn_row = turn + token[:, None] * ROTARY_DIM + angle[None, :]
                cos = tl.load(turn_row, mask=rotated, other=1.0)
                sin = tl.load(turn_row + HALF, mask=rotated, other=0.0)
                across = tl.load(query_row[:, None] + partner[None, :], mask=rotated, other=0.0)
                sign = tl.where(leads, -1.0, 1.0)[None, :]
                both = plain.to(tl.float32) * cos + sign * across.to(tl.float32) * sin
                turned = both.to(plain.dtype)
            evicted = tl.maximum(t + 1 - WINDOW - SINKS, 0)
            place = t - evicted if REINDEX else t
            for first_j in range(0, sinks, SINK_KEYS):
                j = first_j + tl.arange(0, SINK_KEYS)
                top, total, sums = _fold(
                    turned,
                    top,
                    total,
                    sums,
                    j,
                    j < sinks,
                    j[None, :] < tl.minimum(window_start, SINKS)[:, None],
                    j[None, :] - place[:, None],
                    slopes,
                    keys,
                    values,
                    block_row,
                    key_block_stride,
                    key_token_stride,
                    value_block_stride,
                    value_token_stride,
                    scale,
                    soft_cap,
                    ALIBI,
                    SOFT_CAP,
                    BLOCK_SIZE,
                    HEAD_SIZE,
                    HEAD_PADDED,
                    PRECISION,
                )

    oldest = tl.maximum(first_t + 1 - WINDOW, 0)
    tiles = tl.cdiv(last_t + 1 - oldest, TILE_KEYS)
    for key_tile in range(split * tiles // SPLITS, (split + 1) * tiles // SPLITS):
        j = oldest + key_tile * TILE_KEYS + tl.arange(0, TILE_KEYS)
        top, total, sums = _fold(
            plain,
            top,
            total,
            sums,
            j,
            j <= last_t,
            (j[None, :] >= window_start[:, None]) & (j[None, :] <= t[:, None]),
            j[None, :] - t[:, None],
            slopes,
            keys,
            values,
            block_row,
            key_block_stride,
            key_token_stride,
            value_block_stride,
            value_token_stride,
            scale,
            soft_cap,
            ALIBI,
            SOFT_CAP,
            BLOCK_SIZE,
            HEAD_SIZE,
            HEAD_PADDED,
            PRECISION,
        )

    if value_scale is not None:
        sums *= tl.load(value_scale)
    if SPLITS == 1:
        at = (token * HEADS + head) * HEAD_SIZE
        tl.store(
            out + at[:, None] + dim[None, :], (sums / total[:, None]).to(out.dtype.element_ty), own
        )
    else:
        at = (token * HEADS + head) * SPLITS + split
        seen = total > 0
        total = tl.where(seen, total, 1.0)
        mean = sums / total[:, None]
        tl.store(out + at[:, None] * HEAD_PADDED + dim[None, :], mean, in_tile[:, None])
        tl.store(lse + at, tl.where(seen, top + tl.log2(total), float("-inf")), in_tile)


@triton.jit(do_not_specialize=["requests"])
def _merge(
    out,
    parts,
    lse,
    query_start_loc,
    requests,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: tokens, heads."""
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(query_start_loc + requests):
        return
    row = token * HEADS + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, HEAD_PADDED)
    log_sum = tl.load(lse + row * SPLITS + split)
    weight = tl.exp2(log_sum - tl.max(log_sum, axis=0))
    part = tl.load(parts + (row * SPLITS + split)[:, None] * HEAD_PADDED + dim[None, :])
    mean = tl.sum(part * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out + row * HEAD_SIZE + dim, mean.to(out.dtype.element_ty), dim < HEAD_SIZE)


@triton.jit
def _write(
    key,
    value,
    keys,
    values,
    key_scale,
    value_scale,
    slots,
    new_key_stride,
    new_key_head_stride,
    new_value_stride,
    new_value_head_stride,
    key_block_stride,
    key_head_stride,
    key_token_stride,
    value_block_stride,
    value_head_stride,
    value_token_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """Grid: tokens, KV heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    dim = tl.arange(0, HEAD_PADDED)
    in_head = dim < HEAD_SIZE
    k = tl.load(key + token * new_key_stride + head * new_key_head_stride + dim, in_head)
    v = tl.load(value + token * new_value_stride + head * new_value_head_stride + dim, in_head)
    if key_scale is not None:
        k = k.to(tl.float32) / tl.load(key_scale)
    if value_scale is not None:
        v = v.to(tl.float32) / tl.load(value_scale)
    key_at = block * key_block_stride + head * key_head_stride + offset * key_token_stride
    value_at = block * value_block_stride + head * value_head_stride + offset * value_token_stride
    tl.store(keys + key_at + dim, k.to(keys.dtype.element_ty), in_head)
    tl.store(values + value_at + dim, v.to(values.dtype.element_ty), in_head)


@dataclass(frozen=True)
class Tiling:
    """How a step is cut into programs: from what the host knows, for a CUDA graph to hold."""

    tiles: int
    queries: int
    rows: int
    keys: int
    splits: int
    decode: bool

    @classmethod
    def of(
        cls, batch: Batch, query: torch.Tensor, kv_heads: int, window: int, processors: int
    ) -> "Tiling":
        """`query` as in `Attention.attend`; `processors` of the GPU."""
        tokens, heads, head_size = query.shape
        group, requests = heads // kv_heads, len(batch.seq_lens)
        row_bytes = triton.next_power_of_2(head_size) * query.element_size()
        keys = max(LEAST_ROWS, min(64, KEY_TILE_BYTES // row_bytes))
        packed = max(LEAST_ROWS, triton.next_power_of_2(group))
        if batch.max_query_len > 1:
            rows = max(packed, min(64, QUERY_TILE_BYTES // row_bytes))
            queries = rows // group
            return cls(tokens // queries + requests, queries, rows, keys, 1, decode=False)
        wanted = cdiv(PROGRAMS_A_PROCESSOR * processors, requests * kv_heads)
        splits = min(MOST_SPLITS, triton.next_power_of_2(min(wanted, cdiv(window, keys))))
        return cls(requests, 1, packed, keys, splits, decode=True)


@dataclass(frozen=True)
class TritonAttention:
    """An `Attention` of queries in float32, bfloat16 or float16, accumulated in float32.

    The cache is of the same dtype, or of a narrower one with scales.
    """

    processors: int
    """Streaming multiprocessors of the GPU."""

    def as_cache(self, storage: torch.Tensor) -> KVCache:
        keys, values = storage.chunk(2, dim=-1)
        return KVCache(keys, values)

    def write(
        self, key: torch.Tensor, value: torch.Tensor, cache: KVCache, slots: torch.Tensor
    ) -> None:
        _, kv_heads, block_size, head_size = cache.keys.shape
        assert key.stride(2) == value.stride(2) == 1
        _write[len(slots), kv_heads](
            key,
            value,
            cache.keys,
            cache.values,
            cache.key_scale,
            cache.value_scale,
            slots,
            *key.stride()[:2],
            *value.stride()[:2],
            *cache.keys.stride()[:3],
            *cache.values.stride()[:3],
            block_size,
            head_size,
            triton.next_power_of_2(head_size),
        )

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
        tokens, heads, head_size = query.shape
        _, kv_heads, block_size, _ = cache.keys.shape
        assert out.is_contiguous()
        assert query.stride(2) == cache.keys.stride(3) == cache.values.stride(3) == 1
        padded = triton.next_power_of_2(head_size)
        tiling = Tiling.of(batch, query, kv_heads, geometry.window, self.processors)
        parts, lse = out, None
        if tiling.splits > 1:
            shape = (tokens, heads, tiling.splits)
            parts = torch.empty(*shape, padded, dtype=torch.float32, device=query.device)
            lse = torch.empty(shape, dtype=torch.float32, device=query.device)
        sink_keys = max(LEAST_ROWS, triton.next_power_of_2(geometry.sinks))
        _attend[tiling.tiles, kv_heads, tiling.splits](
            parts,
            lse,
            query,
            cache.keys,
            cache.values,
            cache.key_scale,
            cache.value_scale,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table,
            turn.rows if turn else None,
            scoring.alibi_slopes,
            scoring.sink_logits,
            len(batch.seq_lens),
            scoring.scale,
            scoring.soft_cap,
            *query.stride()[:2],
            batch.block_table.stride(0),
            *cache.keys.stride()[:3],
            *cache.values.stride()[:3],
            SINKS=geometry.sinks,
            WINDOW=geometry.window,
            REINDEX=scoring.reindex,
            SOFT_CAP=scoring.soft_cap != 0,
            ROTARY_DIM=turn.rows.shape[1] if turn else 0,
            NEOX=turn.is_neox_style if turn else True,
            HEADS=heads,
            GROUP=heads // kv_heads,
            HEAD_SIZE=head_size,
            HEAD_PADDED=padded,
            BLOCK_SIZE=block_size,
            DECODE=tiling.decode,
            TILE_QUERIES=tiling.queries,
            TILE_ROWS=tiling.rows,
            TILE_KEYS=tiling.keys,
            SINK_KEYS=min(sink_keys, tiling.keys),
            SPLITS=tiling.splits,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        )
        if tiling.splits > 1:
            _merge[tokens, heads](
                out,
                parts,
                lse,
                batch.query_start_loc,
                len(batch.seq_lens),
                heads,
                head_size,
                padded,
                tiling.splits,
            )

"""Steps of every kind as tensors, who can take them, and how far that is from float64."""

import os
import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from vllm_sink.attention.cpu import COMPILER, CPUAttention
from vllm_sink.attention.interface import Attention, Batch, KVCache, Scoring, SinkTurn
from vllm_sink.geometry import Geometry
from vllm_sink.rotary import cos_sin

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason="no C++ compiler")
needs_triton = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no GPU and no TRITON_INTERPRET=1"
)
DEFAULT = Geometry(5, 97)
H100_PROCESSORS = 132
FP8_SCALES = (0.25, 0.125)
"""Of keys and values."""
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """Requests as (queries of this step, tokens of the stream)."""

    requests: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    block_size: int = 32
    geometry: Geometry = DEFAULT
    rotary_dim: int = 32
    is_neox_style: bool = True
    soft_cap: float = 0.0
    alibi: bool = False
    learned_sinks: bool = False
    reindex: bool = True


@dataclass
class Inputs:
    query: torch.Tensor
    """[tokens, heads, head_size], rotated at stream positions."""
    keys: list[torch.Tensor]
    """Of each stream, [seq_len, kv_heads, head_size], rotated at stream positions."""
    values: list[torch.Tensor]
    batch: Batch
    turn: SinkTurn | None
    scoring: Scoring

    def to(self, device: str) -> "Inputs":
        batch, turn, scoring = self.batch, self.turn, self.scoring
        slopes, logits = scoring.alibi_slopes, scoring.sink_logits
        return Inputs(
            self.query.to(device),
            [keys.to(device) for keys in self.keys],
            [values.to(device) for values in self.values],
            replace(
                batch,
                query_start_loc=batch.query_start_loc.to(device),
                seq_lens=batch.seq_lens.to(device),
                block_table=batch.block_table.to(device),
            ),
            turn and replace(turn, rows=turn.rows.to(device)),
            replace(
                scoring,
                alibi_slopes=None if slopes is None else slopes.to(device),
                sink_logits=None if logits is None else logits.to(device),
            ),
        )

    def double(self) -> "Inputs":
        return replace(
            self,
            query=self.query.double(),
            keys=[keys.double() for keys in self.keys],
            values=[values.double() for values in self.values],
        )


def inputs(case: Case, dtype: torch.dtype, seed: int) -> Inputs:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    queries = [queries for queries, _ in case.requests]
    lengths = [length for _, length in case.requests]
    starts = torch.tensor([0, *queries]).cumsum(0)
    blocks = [-(-length // case.block_size) for length in lengths]
    # Block 0 is vLLM's null block; the others in any order, entries past a stream's end left null.
    ids = torch.randperm(sum(blocks), generator=random) + 1
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, own in zip(table, ids.split(blocks), strict=True):
        row[: len(own)] = own
    t = torch.cat([torch.arange(n - q, n) for q, n in case.requests])
    evicted = (t + 1 - case.geometry.window - case.geometry.sinks).clamp(min=0)
    inv_freq = 10000.0 ** (-torch.arange(0, case.rotary_dim, 2) / case.rotary_dim)
    turned = case.reindex and not case.alibi
    return Inputs(
        query=normal(int(starts[-1]), case.heads, case.head_size),
        keys=[normal(n, case.kv_heads, case.head_size) for n in lengths],
        values=[normal(n, case.kv_heads, case.head_size) for n in lengths],
        batch=Batch(starts.int(), torch.tensor(lengths, dtype=torch.int32), table, max(queries)),
        turn=SinkTurn(cos_sin(-evicted, inv_freq), case.is_neox_style) if turned else None,
        scoring=Scoring(
            scale=case.head_size**-0.5,
            soft_cap=case.soft_cap,
            alibi_slopes=torch.rand(case.heads, generator=random) if case.alibi else None,
            sink_logits=torch.randn(case.heads, generator=random) if case.learned_sinks else None,
            reindex=case.reindex,
        ),
    )


def device_of(attention: Attention) -> str:
    on_gpu = torch.cuda.is_available() and not isinstance(attention, CPUAttention)
    return "cuda" if on_gpu else "cpu"


def paged(attention: Attention, case: Case, given: Inputs, tokens_first: bool = False) -> KVCache:
    """The streams' keys and values, written into memory poisoned with NaN.

    `tokens_first`: vLLM's other layout of a block, the same shape by other strides.
    """
    heads, tokens = (2, 1) if tokens_first else (1, 2)
    shape = [int(given.batch.block_table.max()) + 1, 0, 0, 2 * case.head_size]
    shape[heads], shape[tokens] = case.kv_heads, case.block_size
    storage = torch.full(shape, torch.nan, dtype=given.query.dtype, device=given.query.device)
    cache = attention.as_cache(storage.transpose(1, 2) if tokens_first else storage)
    write_streams(attention, case, given, cache)
    return cache


def paged_in_fp8(attention: Attention, case: Case, given: Inputs) -> KVCache:
    """Keys as quarters and values as eighths, for those that these can hold."""
    blocks, device = int(given.batch.block_table.max()) + 1, given.query.device
    shape = (blocks, case.kv_heads, case.block_size, 2 * case.head_size)
    nan = torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    scales = [torch.tensor(scale, device=device) for scale in FP8_SCALES]
    cache = replace(attention.as_cache(nan), key_scale=scales[0], value_scale=scales[1])
    write_streams(attention, case, given, cache)
    return cache


def write_streams(attention: Attention, case: Case, given: Inputs, cache: KVCache) -> None:
    streams = zip(given.batch.block_table.long(), given.keys, given.values, strict=True)
    for row, keys, values in streams:
        position = torch.arange(len(keys), device=keys.device)
        slots = row[position // case.block_size] * case.block_size + position % case.block_size
        attention.write(keys, values, cache, slots)


def attend(attention: Attention, case: Case, given: Inputs) -> torch.Tensor:
    """On the CPU again."""
    given = given.to(device_of(attention))
    return over(paged(attention, case, given), attention, case, given)


def over(cache: KVCache, attention: Attention, case: Case, given: Inputs) -> torch.Tensor:
    """What `attention` writes into memory poisoned with NaN."""
    out = torch.full_like(given.query, torch.nan)
    attention.attend(given.query, cache, given.batch, case.geometry, given.scoring, given.turn, out)
    return out.cpu()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert not got.isnan().any()
    return float((got.double() - want).norm() / want.norm())


DECODE = ((1, 300), (1, 17), (1, 1), (1, 105), (1, 98), (1, 102))
MIXED = ((1, 300), (17, 17), (5, 200), (64, 400), (1, 1), (3, 105))
CASES = {
    "mixed": Case(MIXED),
    "decode": Case(DECODE),
    "decode, alibi": Case(DECODE, geometry=Geometry(40, 157), alibi=True),
    "decode, multi-query": Case(DECODE, heads=7, kv_heads=1, geometry=Geometry(4, 200)),
    "mha": Case(MIXED, heads=3, kv_heads=3),
    "multi-query": Case(MIXED, heads=7, kv_heads=1, head_size=64),
    "sinks over two blocks": Case(MIXED, geometry=Geometry(40, 57)),
    "no sinks": Case(MIXED, geometry=Geometry(0, 65)),
    "window of one": Case(MIXED, geometry=Geometry(4, 1)),
    "long chunks": Case(((512, 512), (512, 1024)), geometry=Geometry(4, 130), block_size=128),
    "partial interleaved": Case(MIXED, head_size=80, rotary_dim=20, is_neox_style=False),
    "stream distance": Case(MIXED, reindex=False),
    "learned sinks": Case(MIXED, learned_sinks=True),
    "decode, learned sinks": Case(DECODE, learned_sinks=True, geometry=Geometry(4, 157)),
    "learned sinks alone": Case(MIXED, learned_sinks=True, geometry=Geometry(0, 65)),
    "soft cap": Case(MIXED, soft_cap=5.0),
    "alibi": Case(MIXED, alibi=True),
    "alibi, stream distance": Case(MIXED, alibi=True, reindex=False),
    **{
        f"head of {size}": Case(((1, 200), (9, 210)), head_size=size)
        for size in (64, 96, 112, 128, 160, 192, 224, 256, 512)
    },
}

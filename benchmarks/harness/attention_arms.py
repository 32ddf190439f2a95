"""Steps of a GPU as tensors, and the kernels that compute their attention: ours and vLLM's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.harness import cli
from vllm_sink.attention.interface import Attention, Batch, KVCache, Scoring, SinkTurn
from vllm_sink.attention.reference import ReferenceAttention
from vllm_sink.geometry import Geometry, cdiv
from vllm_sink.rotary import cos_sin

SINKS = 4
BLOCK = 16
NEAR = 2**12
TOLERANCE = 2e-2
CHECKED_STREAMS = 2


@dataclass(frozen=True)
class Shape:
    """Of a layer's attention."""

    heads: int
    kv_heads: int
    head_size: int = 128


MODELS = {"Llama-2-7B": Shape(32, 32), "Llama-3-8B": Shape(32, 8)}


@dataclass(frozen=True)
class Point:
    """A step in which `streams` streams, of `length` tokens with it, have `queries` tokens each."""

    kind: str
    model: str
    cache: int
    """S + W."""
    length: int
    streams: int = 1
    queries: int = 1

    @property
    def live_blocks(self) -> list[int]:
        """Of each stream: with sinks, or with a window of S + W."""
        oldest = Geometry(0, self.cache).window_start(self.length - self.queries)
        window = range(oldest // BLOCK, cdiv(self.length, BLOCK))
        return sorted({*range(cdiv(SINKS, BLOCK)), *window})

    @property
    def storage_shape(self) -> tuple[int, int, int, int]:
        """[blocks, block_size, kv_heads, 2 * head_size], as vLLM lays it out; block 0 is null."""
        shape = MODELS[self.model]
        blocks = 1 + self.streams * len(self.live_blocks)
        return blocks, BLOCK, shape.kv_heads, 2 * shape.head_size

    @property
    def bytes_at_least(self) -> int:
        """That a decode step moves: S + W keys and values of each stream, queries and outputs."""
        shape = MODELS[self.model]
        vectors = self.streams * (2 * self.cache * shape.kv_heads + 2 * shape.heads)
        return vectors * shape.head_size * torch.bfloat16.itemsize


Call = Callable[[], Any]


@dataclass(frozen=True)
class Step:
    """What an implementation of attention is given; all streams are of `length` tokens."""

    query: torch.Tensor
    """[tokens, heads, head_size]"""
    cache: KVCache
    batch: Batch
    length: int
    geometry: Geometry
    turn: SinkTurn | None

    @property
    def scale(self) -> float:
        return float(self.query.shape[2] ** -0.5)

    def call(self, attention: Attention, out: torch.Tensor) -> Call:
        given = (self.query, self.cache, self.batch, self.geometry, Scoring(self.scale), self.turn)
        return partial(attention.attend, *given, out)

    def first(self, streams: int) -> "Step":
        batch = replace(
            self.batch,
            query_start_loc=self.batch.query_start_loc[: streams + 1],
            seq_lens=self.batch.seq_lens[:streams],
            block_table=self.batch.block_table[:streams],
        )
        tokens = int(batch.query_start_loc[-1])
        turn = self.turn and replace(self.turn, rows=self.turn.rows[:tokens])
        return replace(self, query=self.query[:tokens], batch=batch, turn=turn)

    def without_sinks(self, window: int) -> "Step":
        return replace(self, geometry=Geometry(0, window), turn=None)

    def whole(self, blocks: list[int], length: int) -> "Step":
        """Over streams of `length` tokens that lie in these of each stream's blocks."""
        table = self.batch.block_table[:, blocks[: cdiv(length, BLOCK)]].contiguous()
        lengths = torch.full_like(self.batch.seq_lens, length)
        batch = replace(self.batch, seq_lens=lengths, block_table=table)
        return replace(self.without_sinks(length), batch=batch, length=length)


def step(point: Point, device: str) -> Step:
    """With the blocks of all streams in any order, and those that are freed null in the table."""
    shape, random = MODELS[point.model], torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=random, dtype=torch.bfloat16, device=device)
    integers = partial(torch.arange, device=device)
    tokens, live = point.streams * point.queries, point.live_blocks
    table = torch.zeros(point.streams, cdiv(point.length, BLOCK), dtype=torch.int32, device=device)
    ids = torch.randperm(point.streams * len(live), generator=random, device=device) + 1
    table[:, live] = ids.view(point.streams, -1).int()
    starts = integers(0, tokens + 1, point.queries, dtype=torch.int32)
    t = integers(point.length - point.queries, point.length).repeat(point.streams)
    evicted = (t + 1 - point.cache).clamp(min=0)
    inv_freq = 10000.0 ** (-integers(0, shape.head_size, 2) / shape.head_size)
    return Step(
        query=normal(tokens, shape.heads, shape.head_size),
        cache=ReferenceAttention().as_cache(normal(*point.storage_shape).transpose(1, 2)),
        batch=Batch(starts, torch.full_like(starts[1:], point.length), table, point.queries),
        length=point.length,
        geometry=Geometry(SINKS, point.cache - SINKS),
        turn=SinkTurn(cos_sin(-evicted, inv_freq), is_neox_style=True),
    )


def verify(where: str, given: Step, out: torch.Tensor) -> None:
    """Compare `out` with the reference, in float64, for the first streams.

    Raises:
        BenchmarkError: it is not finite everywhere, or a token of those streams is wrong.
    """
    if not out.isfinite().all():
        raise cli.BenchmarkError(f"{where}: its output is not all written, or not all finite.")
    few = given.first(CHECKED_STREAMS)
    want = torch.empty_like(few.query, dtype=torch.float64)
    replace(few, query=few.query.double()).call(ReferenceAttention(), want)()
    difference = (out[: len(want)] - want).flatten(1).norm(dim=1)
    error = float((difference / want.flatten(1).norm(dim=1)).max())
    if error > TOLERANCE:
        raise cli.BenchmarkError(f"{where}: a token's output is off by {error:.3f} of its norm.")


def ours(given: Step, out: torch.Tensor) -> Call:
    from vllm_sink.attention.triton import TritonAttention

    processors = torch.cuda.get_device_properties(out.device).multi_processor_count
    return given.call(TritonAttention(processors), out)


def vllm(given: Step, out: torch.Tensor) -> Call:
    """As vllm/v1/attention/backends/triton_attn.py has it."""
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    segments = triton_attn.NUM_PAR_SOFTMAX_SEGMENTS
    # vLLM goes on to the nearest size of a CUDA graph: the same, for 8 KV heads and for 32.
    streams = triton_attn.MIN_LAUNCH_GRID_SIZE_2D // given.cache.keys.shape[1]
    parts = torch.empty(streams, out.shape[1], segments, out.shape[2], device=out.device)
    return partial(
        unified_attention,
        **_in_vllm(given, out),
        seq_threshold_3D=streams,
        num_par_softmax_segments=segments,
        softmax_segm_output=parts,
        softmax_segm_max=torch.empty_like(parts[..., 0]),
        softmax_segm_expsum=torch.empty_like(parts[..., 0]),
    )


def flash(given: Step, out: torch.Tensor) -> Call:
    """As vllm/v1/attention/backends/flash_attn.py has it."""
    from vllm.config.attention import AttentionConfig
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    arguments = _in_vllm(given, out)
    version = get_flash_attn_version(head_size=out.shape[2])
    if version == 3:
        decode = given.batch.max_query_len == 1
        captured = AttentionConfig().flash_attn_max_num_splits_for_cuda_graph
        # vLLM captures decode; what is not captured may have any number of splits.
        arguments["num_splits"] = captured if decode else 0
        shared = ("max_seqlen_q", "max_seqlen_k", "cu_seqlens_q", "causal", "window_size")
        arguments["scheduler_metadata"] = get_scheduler_metadata(
            **{name: arguments[name] for name in (*shared, "num_splits")},
            batch_size=len(given.batch.seq_lens),
            num_heads_q=out.shape[1],
            num_heads_kv=given.cache.keys.shape[1],
            headdim=out.shape[2],
            cache_seqlens=given.batch.seq_lens,
            qkv_dtype=out.dtype,
            page_size=BLOCK,
        )
    return partial(flash_attn_varlen_func, **arguments, fa_version=version)


def _in_vllm(given: Step, out: torch.Tensor) -> dict[str, Any]:
    """The arguments that vLLM's kernels have in common."""
    window = given.geometry.window
    return {
        "q": given.query,
        "k": given.cache.keys.transpose(1, 2),
        "v": given.cache.values.transpose(1, 2),
        "out": out,
        "cu_seqlens_q": given.batch.query_start_loc,
        "max_seqlen_q": given.batch.max_query_len,
        "seqused_k": given.batch.seq_lens,
        "max_seqlen_k": given.length,
        "softmax_scale": given.scale,
        "causal": True,
        "window_size": [window - 1, 0] if window < given.length else [-1, -1],
        "block_table": given.batch.block_table,
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
    }


Kernel = Callable[[Step, torch.Tensor], Call]
"""Makes ready what writes the attention of a step to a tensor."""


def arms(point: Point, device: str) -> dict[str, tuple[Kernel, Step]]:
    """Who computes what at `point`."""
    given = step(point, device)
    if point.kind == "position":
        return {"near": (ours, step(replace(point, length=NEAR), device)), "far": (ours, given)}
    if point.kind == "prefill":
        window = given.without_sinks(point.cache - SINKS)
        return {"sinks": (ours, given), "vllm": (vllm, window), "flash": (flash, window)}
    whole = given.whole(point.live_blocks, point.cache)
    return {
        "sinks": (ours, given),
        "window": (ours, given.without_sinks(point.cache)),
        "vllm": (vllm, whole),
        "flash": (flash, whole),
    }

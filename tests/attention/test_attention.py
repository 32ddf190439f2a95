"""Every implementation against float64, on fresh random inputs, in poisoned memory."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sink.attention import cpu
from vllm_sink.attention.cpu import COMPILER, CPUAttention, cpu_attention
from vllm_sink.attention.interface import Attention, Batch, KVCache, Scoring, SinkTurn
from vllm_sink.attention.reference import ReferenceAttention
from vllm_sink.geometry import Geometry
from vllm_sink.rotary import cos_sin, rotate

DEFAULT = Geometry(5, 97)
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
        batch=Batch(starts.int(), torch.tensor(lengths, dtype=torch.int32), table),
        turn=SinkTurn(cos_sin(-evicted, inv_freq), case.is_neox_style) if turned else None,
        scoring=Scoring(
            scale=case.head_size**-0.5,
            soft_cap=case.soft_cap,
            alibi_slopes=torch.rand(case.heads, generator=random) if case.alibi else None,
            reindex=case.reindex,
        ),
    )


def paged(attention: Attention, case: Case, given: Inputs) -> KVCache:
    """The streams' keys and values, written into memory poisoned with NaN."""
    table, block_size = given.batch.block_table, case.block_size
    shape = (int(table.max()) + 1, case.kv_heads, block_size, 2 * case.head_size)
    cache = attention.as_cache(torch.full(shape, torch.nan, dtype=given.query.dtype))
    for row, keys, values in zip(table.long(), given.keys, given.values, strict=True):
        position = torch.arange(len(keys))
        slots = row[position // block_size] * block_size + position % block_size
        attention.write(keys, values, cache, slots)
    return cache


def attend(attention: Attention, case: Case, given: Inputs) -> torch.Tensor:
    out = torch.full_like(given.query, torch.nan)
    cache = paged(attention, case, given)
    attention.attend(given.query, cache, given.batch, case.geometry, given.scoring, given.turn, out)
    return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert not got.isnan().any()
    return float((got.double() - want).norm() / want.norm())


MIXED = ((1, 300), (17, 17), (5, 200), (64, 400), (1, 1), (3, 105))
CASES = {
    "mixed": Case(MIXED),
    "mha": Case(MIXED, heads=3, kv_heads=3),
    "multi-query": Case(MIXED, heads=7, kv_heads=1, head_size=64),
    "sinks over two blocks": Case(MIXED, geometry=Geometry(40, 57)),
    "no sinks": Case(MIXED, geometry=Geometry(0, 65)),
    "window of one": Case(MIXED, geometry=Geometry(4, 1)),
    "long chunks": Case(((512, 512), (512, 1024)), geometry=Geometry(4, 130), block_size=128),
    "partial interleaved": Case(MIXED, head_size=80, rotary_dim=20, is_neox_style=False),
    "stream distance": Case(MIXED, reindex=False),
    "soft cap": Case(MIXED, soft_cap=5.0),
    "alibi": Case(MIXED, alibi=True),
    "alibi, stream distance": Case(MIXED, alibi=True, reindex=False),
    **{
        f"head of {size}": Case(((1, 200), (9, 210)), head_size=size)
        for size in (64, 96, 112, 128, 160, 192, 224, 256, 512)
    },
}

needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_float64(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    given = inputs(case, dtype, seed=len(name))
    want = attend(ReferenceAttention(), case, given.double())
    assert error(attend(kernel(), case, given), want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_the_definition(name: str) -> None:
    """One query and one head at a time, from section 3.2 of arXiv 2309.17453."""
    case = CASES[name]
    given = inputs(case, torch.float32, seed=len(name)).double()
    got = attend(ReferenceAttention(), case, given)
    for token, head in [(0, 0), (len(got) // 2, case.heads - 1), (len(got) - 1, case.heads // 2)]:
        want = one_query(case, given, token, head)
        assert torch.allclose(got[token, head], want, rtol=0, atol=1e-6)


def one_query(case: Case, given: Inputs, token: int, head: int) -> torch.Tensor:
    request = int((given.batch.query_start_loc[1:] <= token).sum())
    t = int(given.batch.seq_lens[request] - given.batch.query_start_loc[request + 1]) + token
    geometry, scoring, kv_head = case.geometry, given.scoring, head * case.kv_heads // case.heads
    visible = geometry.visible(t)
    turned = given.query[token : token + 1]
    if given.turn:
        rows = given.turn.rows[token : token + 1]
        turned = rotate(turned, rows, case.is_neox_style)
    scores = []
    for j in visible:
        is_sink = j < geometry.window_start(t)
        query = (turned[0] if is_sink else given.query[token])[head]
        score = query @ given.keys[request][j, kv_head] * scoring.scale
        if scoring.soft_cap:
            score = scoring.soft_cap * torch.tanh(score / scoring.soft_cap)
        if scoring.alibi_slopes is not None:
            at, key_at = t, j
            if scoring.reindex:
                at, key_at = geometry.cache_position(t, t), geometry.cache_position(t, j)
            score = score + scoring.alibi_slopes[head] * (key_at - at)
        scores.append(score)
    weights = torch.stack(scores).softmax(0)
    return weights @ given.values[request][visible, kv_head]


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    sinks=st.integers(0, 70),
    window=st.integers(1, 140),
    requests=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 300)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_kernel_on_any_geometry(
    sinks: int, window: int, requests: list[tuple[int, int]], seed: int
) -> None:
    streams = tuple((queries, queries + before) for queries, before in requests)
    case = Case(streams, geometry=Geometry(sinks, window))
    given = inputs(case, torch.float32, seed)
    want = attend(ReferenceAttention(), case, given.double())
    assert error(attend(kernel(), case, given), want) <= TOLERANCE[torch.float32]


IMPLEMENTATIONS = [
    pytest.param(CPUAttention, marks=needs_compiler, id="kernel"),
    pytest.param(ReferenceAttention, id="reference"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_is_neither_stored_nor_written(implementation: type[Attention]) -> None:
    """vLLM pads a batch with tokens at slot -1."""
    case = CASES["mixed"]
    given = inputs(case, torch.float32, seed=2)
    cpu_attention()
    attention = implementation()
    cache = paged(attention, case, given)
    before = cache.keys.clone()
    pad = torch.full((2, case.kv_heads, case.head_size), 7.0)
    attention.write(pad, pad, cache, torch.tensor([-1, -1]))
    assert torch.equal(cache.keys.nan_to_num(), before.nan_to_num())
    padded = torch.cat((given.query, torch.randn(2, case.heads, case.head_size)))
    out = torch.full_like(padded, torch.nan)
    attention.attend(padded, cache, given.batch, case.geometry, given.scoring, given.turn, out)
    assert out[-2:].isnan().all()
    assert torch.equal(out[:-2], attend(attention, case, given))


@needs_compiler
def test_queries_may_lie_in_a_wider_tensor() -> None:
    """vLLM hands over slices of the fused query, key and value projection."""
    case = CASES["mixed"]
    given = inputs(case, torch.float32, seed=1)
    wide = torch.randn(len(given.query), 3 * case.heads, case.head_size)
    wide[:, : case.heads] = given.query
    sliced = replace(given, query=wide[:, : case.heads])
    cache = paged(kernel(), case, given)
    out = torch.full_like(given.query, torch.nan)
    kernel().attend(sliced.query, cache, given.batch, case.geometry, given.scoring, given.turn, out)
    assert torch.equal(out, attend(kernel(), case, given))


def test_reference_serves_where_no_compiler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    cpu_attention.cache_clear()
    assert isinstance(cpu_attention(), ReferenceAttention)
    cpu_attention.cache_clear()


@needs_compiler
def test_reference_serves_where_the_compiler_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "SOURCE", tmp_path / "broken.cpp")
    (tmp_path / "broken.cpp").write_text("this is no C++", encoding="utf-8")
    cpu_attention.cache_clear()
    assert isinstance(cpu_attention(), ReferenceAttention)
    assert not list((tmp_path / "vllm_sink").iterdir())
    cpu_attention.cache_clear()


def kernel() -> Attention:
    attention = cpu_attention()
    assert isinstance(attention, CPUAttention)
    return attention

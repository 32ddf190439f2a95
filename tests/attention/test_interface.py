"""Every implementation against float64, on fresh random inputs, in poisoned memory."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attention.cases import (
    CASES,
    DEFAULT,
    INTERPRETED,
    TOLERANCE,
    Case,
    attend,
    device_of,
    error,
    inputs,
    over,
    paged,
)
from vllm_sink.attention.interface import Attention
from vllm_sink.attention.reference import ReferenceAttention
from vllm_sink.geometry import Geometry


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str, dtype: torch.dtype, kernel: Attention) -> None:
    case = CASES[name]
    given = inputs(case, dtype, seed=len(name))
    want = attend(ReferenceAttention(), case, given.double())
    assert error(attend(kernel, case, given), want) <= TOLERANCE[dtype]


@settings(
    max_examples=12 if INTERPRETED else 60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sinks=st.integers(0, 70),
    window=st.integers(1, 140),
    requests=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 300)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_any_geometry(
    kernel: Attention, sinks: int, window: int, requests: list[tuple[int, int]], seed: int
) -> None:
    streams = tuple((queries, queries + before) for queries, before in requests)
    case = Case(streams, geometry=Geometry(sinks, window))
    given = inputs(case, torch.float32, seed)
    want = attend(ReferenceAttention(), case, given.double())
    assert error(attend(kernel, case, given), want) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["mixed", "decode"])
def test_padding_is_neither_stored_nor_written(name: str, implementation: Attention) -> None:
    """vLLM pads a batch with tokens at slot -1, and with requests that have none."""
    case = CASES[name]
    given = inputs(case, torch.float32, seed=2).to(device_of(implementation))
    device = given.query.device
    cache = paged(implementation, case, given)
    before = cache.keys.clone()
    pad = torch.full((2, case.kv_heads, case.head_size), 7.0, device=device)
    implementation.write(pad, pad, cache, torch.tensor([-1, -1], device=device))
    assert torch.equal(cache.keys.nan_to_num(), before.nan_to_num())

    starts, lengths, table = (
        given.batch.query_start_loc,
        given.batch.seq_lens,
        given.batch.block_table,
    )
    batch = replace(
        given.batch,
        query_start_loc=torch.cat((starts, starts[-1:])),
        seq_lens=torch.cat((lengths, torch.zeros_like(lengths[:1]))),
        block_table=torch.cat((table, torch.zeros_like(table[:1]))),
    )
    padding = torch.randn(2, case.heads, case.head_size, device=device)
    padded = replace(given, query=torch.cat((given.query, padding)), batch=batch)
    out = over(cache, implementation, case, padded)
    assert out[-2:].isnan().all()
    assert torch.equal(out[:-2], over(cache, implementation, case, given))


@pytest.mark.parametrize("name", ["mixed", "decode"])
def test_the_freed_middle_is_never_read(name: str, implementation: Attention) -> None:
    """Its entries of the block table point to the null block, which holds NaN."""
    case = CASES[name]
    given = inputs(case, torch.float32, seed=3).to(device_of(implementation))
    cache = paged(implementation, case, given)
    whole = over(cache, implementation, case, given)
    freed = 0
    for i, (queries, length) in enumerate(case.requests):
        dead = DEFAULT.dead_blocks(length - queries, case.block_size)
        given.batch.block_table[i, dead.start : dead.stop] = 0
        freed += len(dead)
    assert freed
    assert torch.equal(over(cache, implementation, case, given), whole)


def test_inputs_may_lie_in_wider_tensors(kernel: Attention) -> None:
    """vLLM hands over slices of the fused query, key and value projection."""
    case = CASES["mixed"]
    given = inputs(case, torch.float32, seed=1).to(device_of(kernel))

    def slice_of_wider(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, torch.randn_like(x)), dim=1)[:, : x.shape[1]]

    sliced = replace(
        given,
        query=slice_of_wider(given.query),
        keys=[slice_of_wider(keys) for keys in given.keys],
        values=[slice_of_wider(values) for values in given.values],
    )
    got = over(paged(kernel, case, sliced), kernel, case, sliced)
    assert torch.equal(got, over(paged(kernel, case, given), kernel, case, given))

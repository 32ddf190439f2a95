"""What is Triton's alone: splits, offsets past 2^31, and that it compiles for GPUs."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.attention.cases import (
    CASES,
    FP8_SCALES,
    H100_PROCESSORS,
    TOLERANCE,
    Case,
    attend,
    device_of,
    error,
    inputs,
    needs_triton,
    over,
    paged,
    paged_in_fp8,
)
from tests.attention.compile_triton import launched
from vllm_sink.attention.interface import Attention
from vllm_sink.attention.reference import ReferenceAttention

pytestmark = needs_triton
DECODE = [name for name in CASES if name.startswith("decode")]


@pytest.fixture
def triton() -> Attention:
    from vllm_sink.attention.triton import TritonAttention

    return TritonAttention(processors=H100_PROCESSORS)


@pytest.mark.parametrize("processors", [1, 10, 1000])
@pytest.mark.parametrize("name", DECODE)
def test_any_number_of_splits_gives_the_same(name: str, processors: int) -> None:
    from vllm_sink.attention.triton import TritonAttention

    case = CASES[name]
    given = inputs(case, torch.float32, seed=processors)
    want = attend(ReferenceAttention(), case, given.double())
    got = attend(TritonAttention(processors), case, given)
    assert error(got, want) <= TOLERANCE[torch.float32]


def test_splits_grow_where_streams_are_few() -> None:
    from vllm_sink.attention.triton import Tiling

    def splits(streams: int) -> int:
        given = inputs(Case(((1, 200),) * streams, heads=32, kv_heads=8), torch.bfloat16, seed=0)
        return Tiling.of(
            given.batch, given.query, 8, window=2048, processors=H100_PROCESSORS
        ).splits

    assert [splits(streams) for streams in (1, 8, 16, 32, 64, 256)] == [16, 8, 4, 2, 1, 1]


@pytest.mark.parametrize("name", ["mixed", "decode"])
def test_elements_past_2_to_the_31(name: str, triton: Attention) -> None:
    """In a cache of which only the blocks at its end are ever touched."""
    case = CASES[name]
    given = inputs(case, torch.float16, seed=5).to(device_of(triton))
    small = paged(triton, case, given)
    used, *block = small.keys.shape
    blocks = 2**31 // (2 * small.keys[0].numel()) + used
    storage = torch.empty(blocks, *block[:2], 2 * block[2], dtype=torch.float16)
    large = triton.as_cache(storage.to(given.query.device))
    for kept, wide in ((small.keys, large.keys), (small.values, large.values)):
        wide[-used:] = kept
    far = replace(given.batch, block_table=given.batch.block_table + (blocks - used))
    assert large.keys[-1].data_ptr() - large.keys.data_ptr() > 2**32
    got = over(large, triton, case, replace(given, batch=far))
    assert torch.equal(got, over(small, triton, case, given))


def test_tokens_may_lie_ahead_of_heads(triton: Attention) -> None:
    case = CASES["mixed"]
    given = inputs(case, torch.float32, seed=6).to(device_of(triton))
    got = over(paged(triton, case, given, tokens_first=True), triton, case, given)
    assert torch.equal(got, over(paged(triton, case, given), triton, case, given))


@pytest.mark.parametrize("name", ["mixed", "decode", "soft cap"])
def test_a_cache_in_fp8(name: str, triton: Attention) -> None:
    """Of keys and values that it can hold: Triton 3.7's interpreter rounds others wrongly."""
    case = CASES[name]
    given = inputs(case, torch.float32, seed=9)

    def held(x: torch.Tensor, scale: float) -> torch.Tensor:
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale

    key_scale, value_scale = FP8_SCALES
    given.keys = [held(keys, key_scale) for keys in given.keys]
    given.values = [held(values, value_scale) for values in given.values]
    want = attend(ReferenceAttention(), case, given.double())
    given = given.to(device_of(triton))
    got = over(paged_in_fp8(triton, case, given), triton, case, given)
    assert error(got, want) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_compiles_ahead_of_time(architecture: str) -> None:
    command = [sys.executable, "-m", "tests.attention.compile_triton", architecture]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected = launched(int(architecture))
    decode = [step for step in expected if step[0].startswith("decode")]
    assert ran.stdout.count("_attend: ") == len(expected)
    assert ran.stdout.count("_merge: ") == len(decode)

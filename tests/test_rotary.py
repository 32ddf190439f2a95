import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sink.rotary import cos_sin, rotate

FREQUENCIES = 1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))
FAR = [0, 1, 10**6, 4 * 10**6, 10**9]

positions = st.integers(0, 10**7)
styles = st.booleans()


def rows_at(position: int) -> torch.Tensor:
    return cos_sin(torch.tensor([position]), FREQUENCIES)


def heads(count: int, head_size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, count, head_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("magnitude", [1.0, 1.19])
def test_rows_equal_float64_at_any_position(magnitude: float) -> None:
    rows = cos_sin(torch.tensor(FAR), FREQUENCIES, magnitude).numpy()
    angles = np.outer(np.array(FAR, np.float64), FREQUENCIES.numpy().astype(np.float64))
    expected = magnitude * np.concatenate((np.cos(angles), np.sin(angles)), axis=1)
    assert rows.dtype == np.float32
    assert np.abs(rows - expected).max() <= 2e-6


def test_rows_are_rounded_last() -> None:
    exact = cos_sin(torch.tensor(FAR), FREQUENCIES, 1.19, torch.float64)
    rounded = cos_sin(torch.tensor(FAR), FREQUENCIES, 1.19, torch.bfloat16)
    assert torch.equal(rounded, exact.to(torch.bfloat16))


def test_a_negative_position_turns_back() -> None:
    forth, back = rows_at(12345), rows_at(-12345)
    assert torch.equal(forth[:, :32], back[:, :32])
    assert torch.equal(forth[:, 32:], -back[:, 32:])


def test_rows_trace_under_inductor() -> None:
    compiled = torch.compile(cos_sin, dynamic=True, fullgraph=True)
    far = torch.tensor(FAR)
    torch.testing.assert_close(
        compiled(far, FREQUENCIES, 1.19), cos_sin(far, FREQUENCIES, 1.19), atol=2e-7, rtol=0
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_on_cuda() -> None:
    far = torch.tensor(FAR)
    rows = cos_sin(far.cuda(), FREQUENCIES.cuda()).cpu()
    torch.testing.assert_close(rows, cos_sin(far, FREQUENCIES), atol=2e-7, rtol=0)


@pytest.mark.parametrize("is_neox_style", [True, False])
def test_rotation_is_multiplication_of_complex_pairs(is_neox_style: bool) -> None:
    x, position = heads(3), 4 * 10**6
    turned = rotate(x, rows_at(position), is_neox_style)

    def pairs(y: torch.Tensor) -> torch.Tensor:
        y = y.double().unflatten(-1, (2, 32) if is_neox_style else (32, 2))
        first, second = y.unbind(-2 if is_neox_style else -1)
        return torch.complex(first, second)

    angles = position * FREQUENCIES.double()
    expected = pairs(x) * torch.polar(torch.ones_like(angles), angles)
    assert (pairs(turned) - expected).abs().max() < 1e-5


@given(a=positions, b=positions, is_neox_style=styles)
def test_turning_twice_is_turning_by_the_sum(a: int, b: int, is_neox_style: bool) -> None:
    x = heads(2)
    twice = rotate(rotate(x, rows_at(a), is_neox_style), rows_at(-b), is_neox_style)
    once = rotate(x, rows_at(a - b), is_neox_style)
    torch.testing.assert_close(twice, once, atol=2e-6, rtol=0)


@given(query_at=positions, key_at=positions, shift=positions, is_neox_style=styles)
def test_scores_depend_on_distance_alone(
    query_at: int, key_at: int, shift: int, is_neox_style: bool
) -> None:
    query, key = heads(1, seed=1), heads(1, seed=2)

    def score(q: int, k: int) -> float:
        turned = rotate(query, rows_at(q), is_neox_style) * rotate(key, rows_at(k), is_neox_style)
        return turned.sum().item()

    near, far = score(query_at, key_at), score(query_at + shift, key_at + shift)
    assert math.isclose(near, far, abs_tol=5e-5)


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dimensions_past_rotary_dim_pass_through(dtype: torch.dtype, is_neox_style: bool) -> None:
    x = heads(3, head_size=96).to(dtype)
    turned = rotate(x, rows_at(10**6), is_neox_style)
    assert turned.dtype == dtype
    assert turned.shape == x.shape
    assert torch.equal(turned[..., 64:], x[..., 64:])
    assert not torch.equal(turned[..., :64], x[..., :64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_by_nothing_is_exact(dtype: torch.dtype) -> None:
    x = heads(3).to(dtype)
    assert torch.equal(rotate(x, rows_at(0), True), x)


def test_rotation_rounds_last() -> None:
    x = heads(3).bfloat16()
    expected = rotate(x.float(), rows_at(10**6), True).bfloat16()
    assert torch.equal(rotate(x, rows_at(10**6), True), expected)

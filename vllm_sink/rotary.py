"""Rotary embeddings without an upper position: no table, angles in float64, rounded last."""

import torch


def cos_sin(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    magnitude: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Cosines and sines of `positions * inv_freq` radians, times `magnitude`.

    positions: int64 [n], of either sign; inv_freq: float32 [rotary_dim / 2], radians a token.
    Returns `dtype` [n, rotary_dim], each row laid out (cos | sin) like a row of vLLM's
    `cos_sin_cache` (model_executor/layers/rotary_embedding/base.py). In float32 the error stays
    below 2e-6 up to position 10^9.
    """
    angles = positions.unsqueeze(-1) * inv_freq.double()
    rows = torch.cat((angles.cos(), angles.sin()), dim=-1)
    if magnitude != 1.0:
        rows = rows * magnitude
    return rows.to(dtype)


def rotate(x: torch.Tensor, rows: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    """Turn the first `rotary_dim` dimensions of every head; the others pass through.

    x: [n, heads, head_size]; rows: [n, rotary_dim] from `cos_sin`. Dimension i is paired with
    i + rotary_dim / 2 in neox style, and 2i with 2i + 1 in interleaved style. Computes in
    float32 or wider and rounds to the dtype of x last. Returns a new tensor of the shape of x.
    """
    rotary_dim = rows.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    turned, passed = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
    cos, sin = rows.to(wide).unsqueeze(-2).chunk(2, dim=-1)
    if is_neox_style:
        first, second = turned.chunk(2, dim=-1)
    else:
        first, second = turned[..., ::2], turned[..., 1::2]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.cat(pair, dim=-1) if is_neox_style else torch.stack(pair, dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), passed), dim=-1)

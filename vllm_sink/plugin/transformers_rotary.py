"""Seam: rotary modules of transformers, whose models vLLM serves with its Transformers backend.

Sources: vllm/model_executor/models/transformers/ and transformers/models/llama/modeling_llama.py.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from vllm_sink.plugin.config import current_settings
from vllm_sink.plugin.rotary import UnboundedRotary

GROWING = {"dynamic", "longrope"}
"""Types of transformers' rotary modules whose frequencies depend on how long a stream is."""


class UnboundedTransformers(UnboundedRotary):
    """Replaces a rotary module of transformers, whose angles are float32."""

    def __init__(self, inv_freq: torch.Tensor, attention_scaling: float, is_rounded: bool) -> None:
        super().__init__()
        self.rotary_dim = 2 * inv_freq.numel()
        self.is_rounded = is_rounded
        self.keep(inv_freq, attention_scaling)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each [*position_ids.shape, rotary_dim], of x's dtype or float32."""
        rows = self.rows(position_ids, x.dtype if self.is_rounded else torch.float32)
        cos, sin = rows.view(*position_ids.shape, self.rotary_dim).chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


class UnboundedByLayerType(nn.ModuleDict):
    """Replaces one with frequencies of its own for each type of layer (Olmo 3's, say)."""

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turned: tuple[torch.Tensor, torch.Tensor] = self[layer_type](x, position_ids)
        return turned


@cache
def register() -> None:
    """Put the replacements in place, once a process; without sink settings nothing changes."""
    register_module_module_registration_hook(_replace)


def _replace(module: nn.Module, name: str, submodule: Any) -> nn.Module | None:
    """Called by torch as `submodule` becomes a child of `module`; another may take its place."""
    if (
        type(submodule).__module__.startswith("transformers.models.")
        and hasattr(submodule, "rope_type")
        and current_settings() is not None
    ):
        return _of_transformers(submodule)
    return None


def _of_transformers(stock: Any) -> nn.Module | None:
    """Ours, if it computes what a rotary module of transformers does, near the beginning.

    Types that change frequencies as a stream grows are left alone, and rotary in sections.
    """
    has_types = isinstance(stock.rope_type, dict)
    types = stock.rope_type if has_types else {"": stock.rope_type}
    if GROWING.intersection(types.values()) or hasattr(stock, "mrope_section"):
        return None
    made: dict[str, UnboundedTransformers] = {}
    for layer_type in types:
        prefix = f"{layer_type}_" if has_types else ""
        inv_freq = getattr(stock, f"{prefix}inv_freq")
        if inv_freq.is_meta:  # of a model that vLLM only looks at
            return None
        near = torch.arange(8, device=inv_freq.device)[None]
        narrow = torch.zeros(1, dtype=torch.bfloat16, device=inv_freq.device)
        ask = (near, layer_type) if has_types else (near,)
        is_rounded = stock(narrow, *ask)[0].dtype == narrow.dtype
        ours = UnboundedTransformers(
            inv_freq, getattr(stock, f"{prefix}attention_scaling"), is_rounded
        )
        for theirs, same in zip(
            stock(narrow.float(), *ask), ours(narrow.float(), near), strict=True
        ):
            if theirs.shape != same.shape or not torch.allclose(theirs, same, atol=1e-5):
                return None
        made[layer_type] = ours
    return UnboundedByLayerType(made) if has_types else made[""]

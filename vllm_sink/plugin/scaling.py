"""Queries that a model scales by their position: by the one in the cache (Ministral 3, Llama 4).

The method of arXiv 2309.17453, section 3.2, knows positions in the cache alone. vLLM computes these
scales in a method of each model's attention, from positions in the stream, and no seam lies
between. If they were a layer of their own, which could be replaced as rotary embeddings are, this
would not be needed.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from vllm_sink.settings import SinkSettings

SCALES = {
    "_get_llama_4_attn_scale": "do_llama_4_scaling",
    "_get_attn_scale": "attn_temperature_tuning",
}
"""Methods that take positions, int64 [tokens], and what says whether they are asked: of
`MistralAttention` and of `Llama4Attention` (vllm/model_executor/models)."""


Scale = Callable[[torch.Tensor], torch.Tensor]
"""Of positions, int64 [tokens]: a factor of each token's queries, [tokens, 1]."""


def scale_by_cache_position(model: nn.Module, settings: SinkSettings) -> dict[str, Scale]:
    """Returns how modules scale from now on, by their names in the model."""
    last = settings.sinks + settings.window_tokens - 1
    scales: dict[str, Scale] = {}
    for module_name, module in model.named_modules():
        for name, is_asked in SCALES.items():
            if hasattr(module, name) and getattr(module, is_asked):
                scales[module_name] = partial(_scale, getattr(module, name), last)
                setattr(module, name, scales[module_name])
    return scales


def _scale(stock: Scale, last: int, positions: torch.Tensor) -> torch.Tensor:
    return stock(positions.clamp(max=last))

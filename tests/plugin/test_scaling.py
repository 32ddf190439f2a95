from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.models.llama4 import Llama4Attention
from vllm.model_executor.models.mistral import MistralAttention

from vllm_sink.plugin.scaling import scale_by_cache_position
from vllm_sink.settings import SinkSettings

SETTINGS = SinkSettings(sink_tokens=4, window_tokens=28)
FIRST = 16
"""Position from which on either scale grows, as set up here."""


def mistral() -> Any:
    layer = MistralAttention.__new__(MistralAttention)
    nn.Module.__init__(layer)
    layer.do_llama_4_scaling = True
    layer.llama_4_scaling_beta = 0.5
    layer.llama_4_scaling_original_max_position_embeddings = FIRST
    return layer


def llama4() -> Any:
    layer = Llama4Attention.__new__(Llama4Attention)
    nn.Module.__init__(layer)
    layer.attn_temperature_tuning = True
    layer.floor_scale, layer.attn_scale = FIRST, 0.5
    return layer


@pytest.mark.parametrize(
    ("make", "scale"), [(mistral, "_get_llama_4_attn_scale"), (llama4, "_get_attn_scale")]
)
def test_a_scale_goes_by_the_place_in_the_cache(make: Any, scale: str) -> None:
    stock, model = make(), nn.ModuleList([make(), nn.Linear(1, 1)])
    scale_by_cache_position(model, SETTINGS)
    positions = torch.tensor([0, 20, 31, 32, 10**6])
    expected = getattr(stock, scale)(torch.tensor([0, 20, 31, 31, 31]))
    found = getattr(model[0], scale)(positions)
    assert torch.equal(found, expected)
    assert found.max() > 1


@pytest.mark.parametrize(
    ("make", "is_asked"), [(mistral, "do_llama_4_scaling"), (llama4, "attn_temperature_tuning")]
)
def test_a_scale_that_is_not_asked_is_left_alone(make: Any, is_asked: str) -> None:
    model = nn.ModuleList([make()])
    setattr(model[0], is_asked, False)
    assert scale_by_cache_position(model, SETTINGS) == {}

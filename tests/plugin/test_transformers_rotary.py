"""Rotary modules of transformers, near the beginning and far out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig, Olmo3Config
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config

from vllm_sink.plugin import register
from vllm_sink.plugin.rotary import UnboundedRotary
from vllm_sink.plugin.transformers_rotary import UnboundedByLayerType, UnboundedTransformers

FAR = [10**6, 4 * 10**6, 10**9]
NEAR = 512
TINY: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": NEAR}
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

register()


@pytest.fixture(autouse=True)
def engine(tmp_path: Path) -> Iterator[None]:
    """One with sinks, being built."""
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    model_config = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    config = VllmConfig(model_config=model_config, additional_config={"sink": {}})
    with set_current_vllm_config(config):
        yield


def placed(theirs: nn.Module) -> Any:
    """What stands where a model puts a rotary module."""
    owner = nn.Module()
    owner.rotary_emb = theirs
    return owner.rotary_emb


def check(ours: UnboundedRotary, theirs: Any, dtype: torch.dtype, *layer_type: str) -> None:
    near, hidden = torch.arange(NEAR)[None], torch.zeros(1, NEAR, 128, dtype=dtype)
    tolerance = 6e-5 if dtype == torch.float32 else 0.01
    found, expected = ours(hidden, near), theirs(hidden, near, *layer_type)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    angles = torch.tensor(FAR, dtype=torch.float64).outer(ours.inv_freq.double())
    cos, sin = ours(hidden.float(), torch.tensor([FAR]))
    for row, exact in ((cos, angles.cos()), (sin, angles.sin())):
        assert (row - ours.magnitude * torch.cat((exact, exact), dim=-1)[None]).abs().max() <= 2e-6


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("module", "config"),
    [
        (
            GPTNeoXRotaryEmbedding,
            GPTNeoXConfig(**TINY, rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
        ),
        (LlamaRotaryEmbedding, LlamaConfig(**TINY)),
    ],
    ids=["GPT-NeoX, yarn", "Llama"],
)
def test_equals_transformers_near_and_float64_far_out(
    module: Any, config: Any, dtype: torch.dtype
) -> None:
    ours = placed(module(config))
    assert isinstance(ours, UnboundedTransformers)
    check(ours, module(config), dtype)


@EVERY_DTYPE
def test_frequencies_of_each_type_of_layer(dtype: torch.dtype) -> None:
    types = ["sliding_attention", "full_attention"]
    config = Olmo3Config(**TINY, layer_types=types, max_position_embeddings=2048)
    config.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {**YARN, "rope_theta": 500000.0},
    }
    ours, theirs = placed(Olmo3RotaryEmbedding(config)), Olmo3RotaryEmbedding(config)
    assert isinstance(ours, UnboundedByLayerType)
    hidden, position = torch.zeros(1, 1, 128, dtype=dtype), torch.tensor([[3]])
    for layer_type in types:
        check(ours[layer_type], theirs, dtype, layer_type)
        found, expected = (each(hidden, position, layer_type)[0] for each in (ours, theirs))
        torch.testing.assert_close(found, expected)


def test_types_that_change_with_the_stream_are_left_alone() -> None:
    config = GPTNeoXConfig(**TINY, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert not isinstance(placed(GPTNeoXRotaryEmbedding(config)), UnboundedRotary)


def test_what_computes_something_else_is_left_alone() -> None:
    class Halved(LlamaRotaryEmbedding):
        def forward(self, x: Any, position_ids: Any) -> Any:
            return super().forward(x, position_ids / 2)

    Halved.__module__ = LlamaRotaryEmbedding.__module__
    assert not isinstance(placed(Halved(LlamaConfig(**TINY))), UnboundedRotary)

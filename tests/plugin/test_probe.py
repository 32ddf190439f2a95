"""What layers of models do with positions: real ones, made tiny, and some that do it otherwise."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from vllm import EngineArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.model_executor.models.llama import LlamaAttention
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_sink.plugin.probe import probe, turn_of
from vllm_sink.plugin.rotary import UnboundedLongRoPE, UnboundedRotary, UnboundedRotaryEmbedding
from vllm_sink.plugin.scaling import scale_by_cache_position
from vllm_sink.plugin.transformers_rotary import UnboundedTransformers
from vllm_sink.settings import SettingsError, SinkSettings

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Within the cache already.
SCALED = {"original_max_position_embeddings": 16, "beta": 0.5}
SETTINGS = SinkSettings(sink_tokens=4, window_tokens=60)
ALTERNATING = ["sliding_attention", "full_attention"]
EVERY_DTYPE = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
Build = Callable[..., tuple[nn.Module, VllmConfig]]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """`build("Llama", hidden_size=64)`: a model of random weights, and its engine's config."""

    @contextmanager
    def one_rank(config: VllmConfig) -> Iterator[None]:
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{tmp_path}/rendezvous", 0, "gloo")
            initialize_model_parallel()
            yield
            cleanup_dist_env_and_memory()

    def make(
        kind: str, dtype: str = "float32", head: str = "ForCausalLM", **sizes: Any
    ) -> tuple[nn.Module, VllmConfig]:
        hf_config = getattr(transformers, f"{kind}Config")(**(SIZES | sizes))
        hf_config.architectures = [kind + head]
        hf_config.save_pretrained(tmp_path / "model")
        config = EngineArgs(
            str(tmp_path / "model"),
            dtype=dtype,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            additional_config={
                "sink": SETTINGS.model_dump(include={"sink_tokens", "window_tokens"})
            },
        ).create_engine_config()
        stack.enter_context(one_rank(config))
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(config)
        random = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) / 8)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        return model, config

    with ExitStack() as stack:
        yield make


def probed(model: nn.Module, config: VllmConfig) -> list[type[UnboundedRotary] | None]:
    """The kind of rotary that each attention layer was found to turn by."""
    scales = scale_by_cache_position(model, SETTINGS)
    probe(model, config, torch.device("cpu"), scales)
    layers = config.compilation_config.static_forward_context.values()
    turns = [turn_of(layer) for layer in layers]
    kinds = (UnboundedLongRoPE, UnboundedTransformers, UnboundedRotaryEmbedding)
    return [turn and next(k for k in kinds if isinstance(turn.rotary, k)) for turn in turns]


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("Llama", {}, [UnboundedRotaryEmbedding] * 2),
        ("Qwen3", {"head_dim": 32}, [UnboundedRotaryEmbedding] * 2),
        ("Phi3", {"rope_parameters": LONGROPE}, [UnboundedLongRoPE] * 2),
        ("Glm4", {"head_dim": 32}, [UnboundedRotaryEmbedding] * 2),
        ("Falcon", {"alibi": True, "multi_query": False}, [None] * 2),
        (
            "Cohere2",
            {"layer_types": ALTERNATING, "sliding_window": 48, "head_dim": 32},
            [UnboundedRotaryEmbedding, None],
        ),
        (
            "Ministral3",
            {"rope_parameters": YARN, "llama_4_scaling": SCALED, "head_dim": 32},
            [UnboundedRotaryEmbedding] * 2,
        ),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, [UnboundedTransformers, None]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_are_told_apart(
    build: Build, kind: str, sizes: dict[str, Any], expected: list[Any], dtype: str
) -> None:
    assert probed(*build(kind, dtype, **sizes)) == expected


def refusal(model: nn.Module, config: VllmConfig) -> str:
    with pytest.raises(SettingsError) as refused:
        probed(model, config)
    sentence = str(refused.value)
    assert sentence.startswith(f"model={config.model_config.model!r}: its layer ")
    assert "; accepted with sinks are layers that turn queries and keys " in sentence
    assert "\n" not in sentence
    return sentence


def test_learned_positions_are_refused(build: Build) -> None:
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
    sentence = refusal(*build("GPT2", head="LMHeadModel", **sizes))
    assert "layer transformer.h.0.attn.attn reads positions beside tokens" in sentence


def scaled_by_position(module: LlamaAttention, positions: torch.Tensor, q: Any, k: Any) -> Any:
    """As Llama 4 and Ministral 3 do: a constant until far out."""
    q, k = module.rotary_emb(positions, q, k)
    return q * (1 + 0.1 * torch.log1p(positions // 8192))[:, None], k


def normed_after(module: LlamaAttention, positions: torch.Tensor, q: Any, k: Any) -> Any:
    q, k = module.rotary_emb(positions, q, k)
    weight = torch.linspace(0.5, 1.5, module.head_dim).repeat(q.shape[-1] // module.head_dim)
    return q * weight, k


def half_the_frequencies(module: LlamaAttention, positions: torch.Tensor, q: Any, k: Any) -> Any:
    return module.rotary_emb(positions // 2, q, k)


def keys_as_they_are(module: LlamaAttention, positions: torch.Tensor, q: Any, k: Any) -> Any:
    q, _ = module.rotary_emb(positions, q, k.clone())
    return q, k


def in_half_the_dimensions(module: LlamaAttention, positions: torch.Tensor, q: Any, k: Any) -> Any:
    turned, k = module.rotary_emb(positions, q.clone(), k)
    heads = q.view(-1, module.num_heads, module.head_dim)
    half = module.head_dim // 2
    heads[..., :half] = turned.view_as(heads)[..., :half]
    return heads.flatten(1), k


def no_numbers(module: LlamaAttention, positions: torch.Tensor, q: Any, k: Any) -> Any:
    q, k = module.rotary_emb(positions, q, k)
    return q * torch.nan, k


@EVERY_DTYPE
@pytest.mark.parametrize(
    "mutant",
    [
        scaled_by_position,
        normed_after,
        half_the_frequencies,
        keys_as_they_are,
        in_half_the_dimensions,
        no_numbers,
    ],
)
def test_a_layer_that_turns_otherwise_is_refused(
    build: Build, monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., Any], dtype: str
) -> None:
    def forward(self: Any, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = mutant(self, positions, q.contiguous(), k.contiguous())
        output: torch.Tensor
        output, _ = self.o_proj(self.attn(q.to(v.dtype), k, v))
        return output

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    sentence = refusal(*build("Llama", dtype))
    assert "layer model.layers.0.self_attn.attn changes queries or keys by position " in sentence


def test_a_layer_of_another_kind_is_refused(build: Build) -> None:
    class Chunked(Attention):
        pass

    model, config = build("Llama")
    layers = config.compilation_config.static_forward_context
    layers["model.layers.1.self_attn.attn"].__class__ = Chunked
    assert "layer model.layers.1.self_attn.attn is of vLLM's class Chunked" in (
        refusal(model, config)
    )

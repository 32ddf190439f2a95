"""Refuse, before anything starts, what sinks would get wrong in silence.

vLLM has no hook for a general plugin to see a finished config, and a model without a layer of ours
(state-space, MLA) never meets our other seams: so `VllmConfig.__post_init__` is wrapped. A config
validation hook for general plugins in vLLM would make this unnecessary.
"""

from functools import wraps
from typing import Any

from vllm.config import ModelConfig, VllmConfig

from vllm_sink.plugin.config import settings_of
from vllm_sink.settings import SettingsError, SinkSettings


def register() -> None:
    """Wrap `VllmConfig.__post_init__` (vllm/config/vllm.py), once a process."""
    original = VllmConfig.__post_init__
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def checked(self: VllmConfig, *args: Any) -> None:
        original(self, *args)
        check(self)

    VllmConfig.__post_init__ = checked


def check(vllm_config: VllmConfig) -> None:
    """Raise `SettingsError`, one sentence, if the engine cannot serve with its sink settings."""
    settings = settings_of(vllm_config)
    model_config = vllm_config.model_config
    if settings is None or model_config is None or model_config.is_submodel_config:
        return
    _check_model(model_config)
    _check_engine(vllm_config)
    if settings.evicts:
        _check_layers(model_config)
        _check_cache_size(settings, model_config)


def trained_context(model_config: ModelConfig) -> int:
    """Tokens the model was trained on, from its config (`max_position_embeddings` and its kin)."""
    return int(model_config.model_arch_config.derived_max_model_len_and_key[0])


def _check_model(model_config: ModelConfig) -> None:
    if model_config.use_mla:
        kind = "multi-head latent"
    elif model_config.attn_type != "decoder":
        kind = model_config.attn_type.replace("_", "-")
    elif model_config.uses_mrope:
        kind = "multimodal rotary"
    elif model_config.is_mm_prefix_lm:
        kind = "prefix-bidirectional"
    else:
        return
    raise SettingsError(
        f"model={model_config.model!r}: its attention is {kind}; "
        "accepted with sinks are decoders of plain causal attention"
    )


def _check_layers(model_config: ModelConfig) -> None:
    config = model_config.hf_text_config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        window = model_config.get_sliding_window()
        layer_types = ["full_attention" if window is None else "sliding_attention"]
    if "full_attention" not in layer_types:
        raise SettingsError(
            f"model={model_config.model!r}: none of its layers has full attention "
            f"({', '.join(sorted(set(layer_types)))}); accepted is a model with at least one"
        )


def _check_engine(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    refused = {
        "device": (vllm_config.device_config.device_type, "cpu"),
        "kv_cache_dtype": (vllm_config.cache_config.cache_dtype, "auto"),
        "speculative_config": (vllm_config.speculative_config, None),
        "kv_transfer_config": (vllm_config.kv_transfer_config, None),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, 1),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, 1),
    }
    for setting, (value, accepted) in refused.items():
        if value != accepted:
            raise SettingsError(
                f"{setting}={value}: not supported with sinks; accepted is {accepted}"
            )


def _check_cache_size(settings: SinkSettings, model_config: ModelConfig) -> None:
    context = trained_context(model_config)
    cached = settings.sinks + settings.window_tokens
    if cached > context:
        raise SettingsError(
            f"sink.sink_tokens + sink.window_tokens={cached}: accepted up to {context}, "
            "the context the model was trained on"
        )

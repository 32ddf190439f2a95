"""Refuse, before anything starts, what sinks would get wrong in silence.

What can be seen of a loaded model alone is for plugin/probe.py.
"""

from math import inf
from typing import Any

from vllm import envs
from vllm.config import AttentionConfig, CacheConfig, ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpecKind

from vllm_sink.plugin.config import SCHEDULERS, WORKERS
from vllm_sink.settings import SettingsError, SinkSettings

CACHE_DTYPES = {"cpu": ("auto",), "cuda": ("auto", "fp8", "fp8_e4m3")}
"""What a backend of ours stores, by the `device_name` of vLLM's platform."""

CPU_FAULT = "vLLM's CPU build gets it wrong, with and without sinks"

WINDOWED = "sliding_attention"
"""What configs call a layer with a window of its own."""

UNKNOWN_CONTEXT = 2048
"""What vLLM assumes of a config that does not say (`_get_and_verify_max_len`)."""


def check(vllm_config: VllmConfig, settings: SinkSettings) -> None:
    """Raise `SettingsError`, one sentence, if the engine cannot serve with its sink settings."""
    model_config = vllm_config.model_config
    if model_config is None or model_config.is_submodel_config:
        return
    _check_model(model_config)
    _check_engine(vllm_config)
    if current_platform.is_cpu():
        _check_cpu_engine(vllm_config)
    if settings.evicts:
        _check_backend(vllm_config)
        _check_layers(model_config)
        _check_cache_size(settings, model_config)
        _check_streams(settings, vllm_config)
        _check_features(model_config)


def trained_context(model_config: ModelConfig) -> int:
    """Tokens the model was trained on, by its config (`max_position_embeddings` and its kin)."""
    tokens, _ = model_config.model_arch_config.derived_max_model_len_and_key
    return UNKNOWN_CONTEXT if tokens == inf else int(tokens)


def full_attention_backend(attention: AttentionConfig) -> AttentionBackendEnum | None:
    """What is asked for layers of full attention, if anything (vllm/v1/attention/selector.py)."""
    kind = KVCacheSpecKind.FULL_ATTENTION.value
    return attention.backend_per_kind.get(kind, attention.backend)


def _check_model(model_config: ModelConfig) -> None:
    kind = _unfit_attention(model_config)
    if kind:
        raise SettingsError(
            f"model={model_config.model!r}: its attention is {kind}; "
            "accepted with sinks are decoders with causal attention over cached keys and values"
        )


def _unfit_attention(model_config: ModelConfig) -> str | None:
    """What attention the model has, if it is not a plain causal decoder's."""
    if model_config.use_mla:
        return "multi-head latent"
    if model_config.attn_type not in ("decoder", "hybrid"):
        return model_config.attn_type.replace("_", "-")
    if not getattr(model_config.hf_text_config, "is_causal", True):
        return "bidirectional"
    if model_config.is_mm_prefix_lm:
        return "prefix-bidirectional"
    return None


def _check_features(model_config: ModelConfig) -> None:
    _accept("runner", model_config.runner_type, "generate")
    _accept("enable_prompt_embeds", model_config.enable_prompt_embeds, False)
    _accept("enable_sleep_mode", model_config.enable_sleep_mode, False)


def _check_layers(model_config: ModelConfig) -> None:
    layer_types = getattr(model_config.hf_text_config, "layer_types", None)
    if layer_types is None and model_config.get_sliding_window() is not None:
        layer_types = [WINDOWED]
    if layer_types is not None and set(layer_types) == {WINDOWED}:
        raise SettingsError(
            f"model={model_config.model!r}: none of its layers has full attention ({WINDOWED}); "
            "accepted is a model with at least one"
        )


def _check_engine(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    _accept("device", current_platform.device_name, *CACHE_DTYPES)
    # Another's would not find out what the model's layers do with positions.
    _accept("worker_cls", parallel.worker_cls, *WORKERS, *WORKERS.values())
    _check_cache(vllm_config.cache_config)
    speculative, transfer = vllm_config.speculative_config, vllm_config.kv_transfer_config
    _accept("speculative_config.method", speculative and speculative.method, None, "ngram")
    _accept("kv_transfer_config.kv_connector", transfer and transfer.kv_connector, None)
    _accept("decode_context_parallel_size", parallel.decode_context_parallel_size, 1)
    _accept("prefill_context_parallel_size", parallel.prefill_context_parallel_size, 1)
    # Half-batches at once would share the rotary rows of a step (plugin/rotary.py).
    _accept("enable_dbo", parallel.enable_dbo, False)
    _accept("ubatch_size", parallel.ubatch_size, 0, 1)


def _check_cache(cache: CacheConfig) -> None:
    _accept("kv_cache_dtype", cache.cache_dtype, *CACHE_DTYPES[current_platform.device_name])
    _accept("kv_cache_dtype_skip_layers", cache.kv_cache_dtype_skip_layers, [])
    _accept("kv_offloading_size", cache.kv_offloading_size, None)
    _accept("kv_sharing_fast_prefill", cache.kv_sharing_fast_prefill, False)
    # Layers with sinks cache every full block, whatever this says of vLLM's windows.
    _accept("prefix_cache_retention_interval", cache.prefix_cache_retention_interval, 0, None)


def _check_cpu_engine(vllm_config: VllmConfig) -> None:
    """What vLLM 0.32's CPU build gets wrong without sinks too, where that can be seen in time."""
    parallel = vllm_config.parallel_config
    _accept("VLLM_BATCH_INVARIANT", int(envs.VLLM_BATCH_INVARIANT), 0, why=CPU_FAULT)
    # Rows without an adapter get another's, once they share a batch with rows that have one.
    _accept("enable_lora", vllm_config.lora_config is not None, False, why=CPU_FAULT)
    if vllm_config.model_config.enforce_eager:
        pipeline = parallel.pipeline_parallel_size
        _accept("pipeline_parallel_size", pipeline, 1, why=f"with enforce_eager, {CPU_FAULT}")


def _accept(
    setting: str, value: Any, *accepted: Any, why: str = "not supported with sinks"
) -> None:
    if value not in accepted:
        are = "is" if len(accepted) == 1 else "are"
        raise SettingsError(
            f"{setting}={value}: {why}; accepted {are} {', '.join(map(str, accepted))}"
        )


def _check_backend(vllm_config: VllmConfig) -> None:
    """On a GPU another backend than ours would evict nothing; on a CPU there is no other."""
    backend = full_attention_backend(vllm_config.attention_config)
    ours = AttentionBackendEnum.CUSTOM
    if current_platform.is_cuda() and backend is not ours:
        raise SettingsError(
            f"attention_backend={backend.name if backend else 'auto'}: would evict nothing; "
            f"accepted with sinks on a GPU is {ours.name}"
        )


def _check_cache_size(settings: SinkSettings, model_config: ModelConfig) -> None:
    context = trained_context(model_config)
    cached = settings.sinks + settings.window_tokens
    if cached > context:
        setting = (
            "sink.sink_tokens + sink.window_tokens" if settings.sinks else "sink.window_tokens"
        )
        raise SettingsError(
            f"{setting}={cached}: accepted up to {context}, the context the model was trained on"
        )


def _check_streams(settings: SinkSettings, vllm_config: VllmConfig) -> None:
    model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config.scheduler_cls
    # Ours is set after this, and an engine's config may be completed again.
    if scheduler not in (None, *SCHEDULERS.values()):
        name = scheduler if isinstance(scheduler, str) else scheduler.__qualname__
        raise SettingsError(
            f"scheduler_cls={name}: takes the place of the one that bounds streams; accepted with "
            "sinks is None"
        )
    if (settings.compact_tokens or 0) > model_config.max_model_len:
        raise SettingsError(
            f"sink.compact_tokens={settings.compact_tokens}: accepted up to "
            f"max_model_len={model_config.max_model_len}, which is the room for a stream's tokens"
        )
    if settings.buffer(model_config.max_model_len):
        routed = vllm_config.aux_output_config.enable_return_routed_experts
        _accept("enable_return_routed_experts", routed, False)

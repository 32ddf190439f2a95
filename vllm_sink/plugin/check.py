"""Refuse, before anything starts, what sinks would get wrong in silence."""

from math import inf
from typing import Any

from vllm import envs
from vllm.config import AttentionConfig, CacheConfig, ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.config import iter_rope_parameters
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpecKind

from vllm_sink.plugin.config import SCHEDULERS
from vllm_sink.settings import SettingsError, SinkSettings

ARCHITECTURES = (
    "FalconForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "IQuestCoderForCausalLM",
    "InternLM3ForCausalLM",
    "LLaMAForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "PhiMoEForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SolarForCausalLM",
    "TeleChat3ForCausalLM",
)
"""Names in vLLM's registry (vllm/model_executor/models/registry.py) whose attention was read.

Each rotates queries and keys last, from their first dimension on, in every layer, or has ALiBi
instead. Turning a query back for its sinks takes that, and it cannot be seen from outside: some
models skip the rotation in some layers, or scale, normalise or split what was rotated.
"""

CACHE_DTYPES = {"cpu": ("auto",), "cuda": ("auto", "fp8", "fp8_e4m3")}
"""What a backend of ours stores, by the `device_name` of vLLM's platform."""

CPU_FAULT = "vLLM's CPU build gets it wrong, with and without sinks"

ROPE_TYPES = ("default", "linear", "ntk", "dynamic", "llama3", "yarn", "longrope")
"""Whose rotary classes ours replace (plugin/rotary.py), by the names of vLLM's `get_rope`."""

SCALED_BY_POSITION = ("attn_temperature_tuning", "dual_chunk_attention_config", "llama_4_scaling")
"""Config keys that make attention depend on the stream position itself, not on distances."""

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
            "accepted with sinks are decoders of plain causal attention"
        )
    if model_config.architecture not in ARCHITECTURES:
        raise SettingsError(
            f"model={model_config.model!r}: its architecture is {model_config.architecture}; "
            f"accepted with sinks are {', '.join(ARCHITECTURES)}"
        )
    for rope in iter_rope_parameters(model_config.hf_text_config):
        if rope["rope_type"] not in ROPE_TYPES:
            raise SettingsError(
                f"rope_parameters.rope_type={rope['rope_type']}: bound to a last position; "
                f"accepted with sinks are {', '.join(ROPE_TYPES)}"
            )
    for key in SCALED_BY_POSITION:
        value = getattr(model_config.hf_text_config, key, None)
        if value:
            raise SettingsError(
                f"model={model_config.model!r}: {key}={value} scales attention by the position in "
                "the stream; accepted with sinks are models without it"
            )


def _unfit_attention(model_config: ModelConfig) -> str | None:
    """What attention the model has, if it is not a plain causal decoder's."""
    if model_config.use_mla:
        return "multi-head latent"
    if model_config.attn_type != "decoder":
        return model_config.attn_type.replace("_", "-")
    if not getattr(model_config.hf_text_config, "is_causal", True):
        return "bidirectional"
    if model_config.uses_mrope:
        return "multimodal rotary"
    if model_config.is_mm_prefix_lm:
        return "prefix-bidirectional"
    return None


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
    _accept("device", current_platform.device_name, *CACHE_DTYPES)
    _check_cache(vllm_config.cache_config)
    speculative, transfer = vllm_config.speculative_config, vllm_config.kv_transfer_config
    _accept("speculative_config.method", speculative and speculative.method, None)
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
        _accept("enable_prompt_embeds", model_config.enable_prompt_embeds, False)
        routed = vllm_config.aux_output_config.enable_return_routed_experts
        _accept("enable_return_routed_experts", routed, False)

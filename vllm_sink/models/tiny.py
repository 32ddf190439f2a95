"""Tiny random checkpoints of vLLM's decoder architectures, as far as transformers can make them."""

import json
from dataclasses import dataclass, field, fields
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

TRAINED = 128
WINDOW, LONG_WINDOW = 48, 100
"""Of layers that have a sliding window of their own; the second is longer than trial.py's W."""

GAIN = 1.5
"""Of every matrix: enough for attention to choose, and for outputs far from uniform."""

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 128,
    "max_position_embeddings": TRAINED,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MULTI_HEAD = {"num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}
SLIDING = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
}


def experts(name: str = "num_experts", **config: Any) -> dict[str, Any]:
    """Four experts, by the name that the config has for their number; two are chosen."""
    return {name: 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64} | config


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": TRAINED // 4,
}
# Sizes that vLLM's CPU kernel of latent attention is compiled for, and YaRN, as DeepSeek has it:
# vLLM leaves it to torch, whose rotary is right for heads in a dimension of their own (see below).
LATENT = {
    "num_key_value_heads": 4,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "head_dim": 64,
}
MAMBA = {
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 32,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
SCALED = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 1.25,
}

SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 128,
}
INDEXED = {"index_topk": 2048, "index_head_dim": 128, "index_n_heads": 4}
DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 1}
MIMO_V2 = (
    SLIDING
    | experts("n_routed_experts", v_head_dim=32)
    | {
        "hybrid_layer_pattern": [1, 0, 1],
        "sliding_window_size": WINDOW,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
        "add_swa_attention_sink_bias": True,
        "moe_layer_freq": [0, 1, 1],
        "layernorm_epsilon": 1e-5,
        "rope_theta": 5_000_000.0,
        "swa_rope_theta": 10_000.0,
        "partial_rotary_factor": 0.334,
    }
)
# vLLM keeps steps above no least one; these are large enough for a state to matter.
STEPS = {"time_step_min": 1e-30, "time_step_floor": 0.5}
NEMOTRON_H = STEPS | {
    "layers_block_type": ["mamba", "full_attention", "mlp"],
    "num_hidden_layers": 3,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "chunk_size": 32,
}
# Heads that are a dimension of their own are turned wrongly by vLLM's rotary kernel for CPUs.
ROTARY_OF_TORCH = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
WHOLE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}


@dataclass(frozen=True)
class Recipe:
    model_type: str
    """Of transformers' config, which may be that of another name for the same model."""
    config: dict[str, Any] = field(default_factory=dict)
    zero: tuple[str, ...] = ()
    """Ends of names of weights that vLLM 0.32 uses otherwise than the model, or not at all."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Arguments without which an engine on a CPU computes something else."""


RECIPES = {
    "AXK1ForCausalLM": Recipe(
        "axk1",
        LATENT | experts("n_routed_experts", first_k_dense_replace=0, n_group=2, topk_group=1),
    ),
    "AfmoeForCausalLM": Recipe(
        "afmoe",
        SLIDING
        | experts(
            num_shared_experts=1, score_func="sigmoid", route_norm=True, n_group=1, topk_group=1
        ),
    ),
    "ApertusForCausalLM": Recipe("apertus", zero=("up_proj.weight",)),
    "BloomForCausalLM": Recipe("bloom", TIED, zero=("dense_h_to_4h.weight",)),
    "Cohere2ForCausalLM": Recipe(
        "cohere2", SLIDING | TIED | {"logit_scale": 1.0, "sliding_window": LONG_WINDOW}
    ),
    "Cohere2MoeForCausalLM": Recipe(
        "cohere2_moe", SLIDING | TIED | experts(logit_scale=1.0, intermediate_size=64)
    ),
    "CohereForCausalLM": Recipe("cohere", TIED | {"logit_scale": 1.0}),
    "DbrxForCausalLM": Recipe(
        "dbrx",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "DeepseekForCausalLM": Recipe("llama", {"n_routed_experts": 4, "first_k_dense_replace": 2}),
    "DeepseekV2ForCausalLM": Recipe(
        "deepseek_v2",
        LATENT | experts("n_routed_experts", first_k_dense_replace=1, n_group=1, topk_group=1),
    ),
    "DeepseekV32ForCausalLM": Recipe(
        "deepseek_v32",
        LATENT | INDEXED | experts("n_routed_experts", **DENSE_FIRST, n_group=1, topk_group=1),
    ),
    "DeepseekV3ForCausalLM": Recipe(
        "deepseek_v3",
        LATENT
        | experts("n_routed_experts", first_k_dense_replace=1)
        | {"n_group": 2, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "Ernie4_5ForCausalLM": Recipe("ernie4_5"),
    "Ernie4_5_MoeForCausalLM": Recipe(
        "ernie4_5_moe",
        experts("moe_num_experts", moe_k=2, moe_num_shared_experts=1),
        zero=("e_score_correction_bias",),
    ),
    "Exaone4ForCausalLM": Recipe("exaone4", SLIDING),
    "ExaoneMoEForCausalLM": Recipe("exaone_moe", SLIDING | experts(num_shared_experts=1)),
    "ExaoneMoeForCausalLM": Recipe("exaone_moe", SLIDING | experts(num_shared_experts=1)),
    "FalconForCausalLM": Recipe("falcon", {"alibi": True, "multi_query": False, "bias": True}),
    "FalconH1ForCausalLM": Recipe("falcon_h1", MAMBA | {"mamba_d_ssm": 256}),
    "FalconMambaForCausalLM": Recipe("falcon_mamba", TIED | {"state_size": 16}),
    "GPT2LMHeadModel": Recipe("gpt2", TIED),
    "GPTJForCausalLM": Recipe("gptj", {"rotary_dim": 16}),
    "Gemma2ForCausalLM": Recipe("gemma2", SLIDING | TIED),
    "Gemma3ForCausalLM": Recipe("gemma3_text", SLIDING | TIED),
    "Gemma3nForCausalLM": Recipe(
        "gemma3n_text",
        TIED | SHARED_KV | {"laurel_rank": 16, "activation_sparsity_pattern": [0.0] * 4},
        zero=("embed_tokens_per_layer.weight",),
    ),
    "Gemma4ForCausalLM": Recipe("gemma4_text", TIED | SHARED_KV | {"global_head_dim": 64}),
    "GemmaForCausalLM": Recipe("gemma", TIED),
    "Glm4ForCausalLM": Recipe("glm4"),
    "Glm4MoeForCausalLM": Recipe(
        "glm4_moe",
        experts("n_routed_experts", first_k_dense_replace=1, use_qk_norm=True, head_dim=32),
    ),
    "Glm4MoeLiteForCausalLM": Recipe(
        "glm4_moe_lite", LATENT | experts("n_routed_experts", **DENSE_FIRST)
    ),
    "GlmMoeDsaForCausalLM": Recipe(
        "glm_moe_dsa", LATENT | INDEXED | experts("n_routed_experts", **DENSE_FIRST)
    ),
    "GptOssForCausalLM": Recipe("gpt_oss", SLIDING | experts("num_local_experts")),
    "GraniteForCausalLM": Recipe("granite", SCALED),
    "GraniteMoeForCausalLM": Recipe("granitemoe", SCALED | experts("num_local_experts")),
    "GraniteMoeHybridForCausalLM": Recipe(
        "granitemoehybrid",
        SCALED
        | MAMBA
        | experts("num_local_experts", shared_intermediate_size=64)
        | {"layer_types": ["mamba", "full_attention"]},
    ),
    "GraniteMoeSWAForCausalLM": Recipe(
        "granitemoe_swa", SLIDING | SCALED | experts("num_local_experts")
    ),
    "GraniteMoeSharedForCausalLM": Recipe(
        "granitemoeshared",
        SCALED | experts("num_local_experts", shared_intermediate_size=64),
    ),
    "GraniteSWAForCausalLM": Recipe("granite_swa", SLIDING | SCALED),
    "HYV3ForCausalLM": Recipe(
        "hy_v3", experts(**DENSE_FIRST, expert_hidden_dim=64, route_norm=True, qk_norm=True)
    ),
    "HrmTextForCausalLM": Recipe(
        "hrm_text",
        MULTI_HEAD | {"num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 2, "prefix_lm": False},
    ),
    "HyperCLOVAXForCausalLM": Recipe("hyperclovax", SCALED),
    "IQuestCoderForCausalLM": Recipe("llama"),
    "InklingForCausalLM": Recipe(
        "inkling_text",
        {
            "layer_types": ["hybrid_sliding", "hybrid"],
            "sliding_window_size": WINDOW,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 32,
            "rel_extent": 64,
            "logits_mup_width_multiplier": 1.0,
        }
        | experts("n_routed_experts", mlp_layer_types=["dense", "sparse"]),
    ),
    "InternLM3ForCausalLM": Recipe("llama"),
    "JambaForCausalLM": Recipe(
        "jamba",
        MAMBA | experts(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=8),
    ),
    "KimiLinearForCausalLM": Recipe(
        "kimi_linear",
        LATENT
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_head_dim": 32,
            "linear_num_heads": 4,
            "q_lora_rank": None,
        }
        | experts("num_local_experts", mlp_layer_types=["dense", "sparse"]),
    ),
    "LLaMAForCausalLM": Recipe("llama"),
    "LagunaForCausalLM": Recipe("laguna", SLIDING | {"mlp_layer_types": ["dense"] * 3}),
    "Lfm2ForCausalLM": Recipe(
        "lfm2",
        TIED | {"layer_types": ["conv", "full_attention"], "conv_dim": 128, "block_dim": 128},
        engine=ROTARY_OF_TORCH,
    ),
    "Lfm2MoeForCausalLM": Recipe(
        "lfm2_moe",
        TIED | experts(layer_types=["conv", "full_attention"], num_dense_layers=1),
        engine=ROTARY_OF_TORCH,
    ),
    "Llama4ForCausalLM": Recipe(
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 8192,
            "floor_scale": 16,
        },
    ),
    "LlamaForCausalLM": Recipe("llama"),
    "LongcatFlashForCausalLM": Recipe(
        "longcat_flash",
        LATENT
        | {
            "num_layers": 1,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 0,
            "ffn_hidden_size": 128,
            "expert_ffn_hidden_size": 64,
            "moe_intermediate_size": 64,
            "intermediate_size": 128,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "zero_expert_type": "identity",
        },
    ),
    "Mamba2ForCausalLM": Recipe(
        "mamba2", {"state_size": 16, "num_heads": 8, "n_groups": 1, "chunk_size": 32}
    ),
    "MambaForCausalLM": Recipe("mamba", TIED | {"state_size": 16}),
    "MiMoForCausalLM": Recipe("qwen2"),
    "MiMoV2FlashForCausalLM": Recipe("mimo_v2_flash", MIMO_V2),
    "MiniCPM3ForCausalLM": Recipe(
        "minicpm3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "dim_model_base": 128,
        },
    ),
    "MiniCPMForCausalLM": Recipe(
        "granite",
        TIED
        | {
            "embedding_multiplier": 2.0,
            "scale_emb": 2.0,
            "residual_multiplier": 1.0,
            "scale_depth": sqrt(2),
            "logits_scaling": 0.5,
            "dim_model_base": 256,
            "attention_multiplier": 32**-0.5,
            "num_experts": 0,
        },
    ),
    "MiniMaxM2ForCausalLM": Recipe(
        "minimax_m2",
        experts(
            "num_local_experts",
            rotary_dim=32,
            num_experts_per_tok=1,
            scoring_func="softmax",
            use_routing_bias=True,
        ),
    ),
    "Ministral3ForCausalLM": Recipe(
        "ministral3",
        {
            "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1},
            "llama_4_scaling": {"original_max_position_embeddings": TRAINED // 4, "beta": 0.1},
        },
    ),
    "MistralForCausalLM": Recipe("mistral", {"sliding_window": None}),
    "MixtralForCausalLM": Recipe("mixtral", experts("num_local_experts")),
    "NemotronForCausalLM": Recipe("nemotron"),
    "NemotronHForCausalLM": Recipe("nemotron_h", NEMOTRON_H),
    "NemotronHPuzzleForCausalLM": Recipe("nemotron_h", NEMOTRON_H),
    "OPTForCausalLM": Recipe("opt", TIED | {"ffn_dim": 128, "word_embed_proj_dim": 128}),
    "OlmoHybridForCausalLM": Recipe("olmo_hybrid", DELTA | MULTI_HEAD),
    "OlmoeForCausalLM": Recipe("olmoe", MULTI_HEAD | experts()),
    "OrionForCausalLM": Recipe("stablelm", {"rms_norm_eps": 1e-5, "rope_parameters": WHOLE}),
    "PanguEmbeddedForCausalLM": Recipe("llama", {"attention_bias": True}),
    "Phi3ForCausalLM": Recipe("phi3"),
    "PhiMoEForCausalLM": Recipe(
        "phimoe",
        experts("num_local_experts", attention_bias=True, lm_head_bias=True),
        zero=("lm_head.bias",),
    ),
    "Qwen2ForCausalLM": Recipe("qwen2"),
    "Qwen2MoeForCausalLM": Recipe("qwen2_moe", experts(shared_expert_intermediate_size=64)),
    "Qwen3ForCausalLM": Recipe("qwen3"),
    "Qwen3MoeForCausalLM": Recipe("qwen3_moe", experts()),
    "Qwen3NextForCausalLM": Recipe(
        "qwen3_next", DELTA | experts(shared_expert_intermediate_size=64)
    ),
    "Qwen3_5ForCausalLM": Recipe("qwen3_5_text", DELTA),
    "Qwen3_5MoeForCausalLM": Recipe(
        "qwen3_5_moe_text", DELTA | experts(shared_expert_intermediate_size=64)
    ),
    "Rnj1ForCausalLM": Recipe("gemma3_text", SLIDING | TIED),
    "SolarForCausalLM": Recipe(
        "llama", {"bskcn_tv": [0.9, 0.8]} | {f"bskcn_{i}": [] for i in range(1, 5)}
    ),
    "StableLmForCausalLM": Recipe("stablelm"),
    "TeleChat3ForCausalLM": Recipe("llama"),
    "TeleFLMForCausalLM": Recipe("llama", {"use_mup": False}),
    "Zamba2ForCausalLM": Recipe(
        "zamba2",
        TIED
        | STEPS
        | {
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "chunk_size": 32,
            "use_mem_rope": True,
            "adapter_rank": 16,
        },
    ),
}
"""By the names in vLLM's registry (vllm/model_executor/models/registry.py)."""

NO_SCAN = "vLLM's CPU build has no kernel for the scan of Mamba 1"
NO_DELTA_RULE = "vLLM's kernels for the delta rule take bfloat16 alone on CPUs"
NO_TRITON = "vLLM has kernels for its linear attention in Triton alone"
NO_INDEXER = "vLLM has no sparse attention on CPUs"

FAULTS = {
    "DbrxForCausalLM": "vLLM 0.32 seeks its experts under names that they no longer have",
    "DeepseekV32ForCausalLM": NO_INDEXER,
    "FalconMambaForCausalLM": NO_SCAN,
    "GlmMoeDsaForCausalLM": NO_INDEXER,
    "HrmTextForCausalLM": "in vLLM its prompts attend to what comes after, with prefix_lm or not",
    "InklingForCausalLM": "vLLM has it with images alone, whose processor asks for a tokenizer",
    "JambaForCausalLM": NO_SCAN,
    "KimiLinearForCausalLM": NO_TRITON,
    "LongcatFlashForCausalLM": "vLLM's CPU build has no kernel for its router (topk_softmax)",
    "MambaForCausalLM": NO_SCAN,
    "OlmoHybridForCausalLM": NO_TRITON,
    "Qwen3NextForCausalLM": NO_DELTA_RULE,
    "Qwen3_5ForCausalLM": NO_DELTA_RULE,
    "Qwen3_5MoeForCausalLM": NO_DELTA_RULE,
    "Rnj1ForCausalLM": "vLLM's CPU backend takes no chunk_lookback",
}
"""Why vLLM's CPU build, without sinks, does not run these, or not as the model is."""


def save(architecture: str, path: Path) -> Path:
    """A checkpoint in float32 that transformers and vLLM load, the same every time."""
    model_of(RECIPES[architecture]).save_pretrained(path)
    config = path / "config.json"
    renamed = json.loads(config.read_text()) | {"architectures": [architecture]}
    config.write_text(json.dumps(renamed, indent=2))
    return path


def model_of(recipe: Recipe) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(recipe)).float()
    for name, weight in model.named_parameters():
        if name.endswith(recipe.zero):
            weight.data.zero_()
            continue
        # What some of vLLM's layers keep in bfloat16 whatever is asked for is exact, so.
        weight.data = _random(name, weight.data).bfloat16().float()
    return model


def _config(recipe: Recipe) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[recipe.model_type]
    names = {field.name for field in fields(kind)}
    sizes = {kind.attribute_map.get(name, name): size for name, size in SIZES.items()}
    return kind(**({name: sizes[name] for name in sizes.keys() & names} | recipe.config))


def _random(name: str, weight: torch.Tensor) -> torch.Tensor:
    if name.endswith("sinks"):
        return torch.empty_like(weight).uniform_(2, 5)
    if weight.dim() > 1:
        return torch.randn_like(weight) * GAIN / sqrt(weight.shape[-1])
    return weight + 0.1 * torch.randn_like(weight)

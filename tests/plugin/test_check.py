"""Refusals on real engine configs of tiny config.json folders: one sentence, before any weights."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_sink.plugin.check import check, trained_context
from vllm_sink.plugin.config import settings_of
from vllm_sink.plugin.scheduler import SinkScheduler
from vllm_sink.settings import SettingsError

CONTEXT = 256
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "vocab_size": 128,
    "torch_dtype": "float32",
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
EXAONE4 = {"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], "sliding_window": 64}
DEEPSEEK = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
MAMBA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": 4,
}
BERT = {"model_type": "bert", "architectures": ["BertModel"]}

Configure = Callable[..., VllmConfig]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """An engine's config, up to where vLLM would start processes: `configure(LLAMA, sink={})`."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")

    def make(model: dict[str, Any], sink: Any = None, **arguments: Any) -> VllmConfig:
        (tmp_path / "config.json").write_text(json.dumps(SIZES | model))
        defaults = {"skip_tokenizer_init": True, "additional_config": {"sink": sink}}
        return EngineArgs(str(tmp_path), **(defaults | arguments)).create_engine_config()

    return make


def sentence_of(configure: Configure, *args: Any, **arguments: Any) -> str:
    """What a refusal says; it is one sentence on one line."""
    with pytest.raises(SettingsError) as refusal:
        configure(*args, **arguments)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert "accepted" in sentence or "should" in sentence
    return sentence


FITS = {"sink_tokens": 4, "window_tokens": CONTEXT - 4}


@pytest.mark.parametrize(
    "sink",
    [FITS, {"policy": "window", "window_tokens": CONTEXT}, {"policy": "full"}, {**FITS}],
    ids=str,
)
def test_what_fits_is_accepted(configure: Configure, sink: dict[str, Any]) -> None:
    config = configure(LLAMA, sink)
    settings = settings_of(config)
    assert settings is not None
    assert settings.model_dump(include=set(sink)) == sink
    assert trained_context(config.model_config) == CONTEXT


def test_without_settings_nothing_is_refused(configure: Configure) -> None:
    assert settings_of(configure(EXAONE4, additional_config={})) is None


@pytest.mark.parametrize(
    ("sink", "expected"),
    [
        ({"sink_tokens": -1}, r"sink\.sink_tokens=-1: .*greater than or equal to 0"),
        ({"window_tokens": 0}, r"sink\.window_tokens=0: .*greater than or equal to 1"),
        ({"window_tokens": 64.5}, r"sink\.window_tokens=64\.5: .*integer"),
        ({"window_tokens": "64"}, r"sink\.window_tokens='64': .*integer"),
        ({"window_token": 64}, r"sink\.window_token=64: unknown; accepted keys are policy, "),
        ({"policy": "sinks"}, r"sink\.policy='sinks': .*'sink', 'window' or 'full'"),
        ({"reindex": "no"}, r"sink\.reindex='no': .*boolean"),
        ([4, 252], r"sink=\[4, 252\]: .*dictionary"),
        (None, r"sink=None: .*dictionary"),
        (
            {"sink_tokens": 5, "window_tokens": CONTEXT - 4},
            rf"sink\.sink_tokens \+ sink\.window_tokens={CONTEXT + 1}: accepted up to {CONTEXT}, ",
        ),
        (
            {"policy": "window", "window_tokens": CONTEXT + 1},
            rf"sink\.window_tokens={CONTEXT + 1}: accepted up to {CONTEXT}, ",
        ),
    ],
    ids=str,
)
def test_settings_are_refused(configure: Configure, sink: Any, expected: str) -> None:
    assert re.match(expected, sentence_of(configure, LLAMA, sink))


def test_every_window_is_held_against_the_trained_context(configure: Configure) -> None:
    """YaRN's factor counts as trained; `max_model_len` says nothing about training."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}
    scaled = LLAMA | {"rope_parameters": yarn | {"rope_theta": 10000.0}}
    config = configure(scaled, FITS | {"window_tokens": 64}, max_model_len=128)
    assert trained_context(config.model_config) >= CONTEXT
    with pytest.raises(SettingsError, match=f"accepted up to {CONTEXT}"):
        configure(LLAMA, {"window_tokens": CONTEXT}, max_model_len=128)


@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        (DEEPSEEK, {}, "its attention is multi-head latent; accepted with sinks are decoders"),
        (MAMBA, {}, "its attention is attention-free; accepted with sinks are decoders"),
        (BERT, {}, "its attention is encoder-only; accepted with sinks are decoders"),
        (
            LLAMA | {"is_causal": False},
            {},
            "its attention is bidirectional; accepted with sinks are decoders",
        ),
        (
            MISTRAL | {"sliding_window": 64},
            {},
            "none of its layers has full attention (sliding_attention); accepted is ",
        ),
        (
            QWEN2 | {"sliding_window": 64, "max_window_layers": 0},
            {},
            "none of its layers has full attention (sliding_attention); accepted is ",
        ),
    ],
    ids=lambda value: value["architectures"][0] if "architectures" in value else "",
)
def test_models_are_refused(
    configure: Configure, model: dict[str, Any], arguments: dict[str, Any], expected: str
) -> None:
    sentence = sentence_of(configure, model, FITS, **arguments)
    assert re.match(r"model='.+': ", sentence)
    assert expected in sentence


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8: "),
        (
            {
                "speculative_config": {
                    "method": "ngram_gpu",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            "speculative_config.method=ngram_gpu: ",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv_transfer_config.kv_connector=ExampleConnector: ",
        ),
        ({"kv_offloading_size": 1.0}, "kv_offloading_size=1.0: "),
        ({"runner": "pooling"}, "runner=pooling: "),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "kv_cache_dtype_skip_layers=['0']: "),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill=True: "),
        ({"prefix_cache_retention_interval": 256}, "prefix_cache_retention_interval=256: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_features_are_refused(
    configure: Configure, arguments: dict[str, Any], expected: str
) -> None:
    sentence = sentence_of(configure, LLAMA, FITS, **arguments)
    assert sentence.startswith(expected)
    assert re.search(r"not supported with sinks; accepted (is|are) .{1,20}$", sentence)


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ({"enable_lora": True}, {}, "enable_lora=True: "),
        ({}, {"VLLM_BATCH_INVARIANT": "1"}, "VLLM_BATCH_INVARIANT=1: "),
        (
            {"pipeline_parallel_size": 2, "enforce_eager": True},
            {},
            "pipeline_parallel_size=2: with enforce_eager, ",
        ),
    ],
    ids=str,
)
def test_what_a_cpu_gets_wrong_is_refused(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    variables: dict[str, str],
    expected: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    sentence = sentence_of(configure, LLAMA, FITS, **arguments)
    assert sentence.startswith(expected)
    assert "vLLM's CPU build gets it wrong, with and without sinks; accepted is " in sentence
    configure(LLAMA, additional_config={}, **arguments)


@pytest.mark.parametrize(
    ("sink", "arguments", "sentence"),
    [
        (
            {"compact_tokens": CONTEXT + 1},
            {},
            f"sink.compact_tokens={CONTEXT + 1}: accepted up to max_model_len={CONTEXT}, which is "
            "the room for a stream's tokens",
        ),
        (
            {},
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            "scheduler_cls=vllm.v1.core.sched.scheduler.Scheduler: takes the place of the one that "
            "bounds streams; accepted with sinks is None",
        ),
        (
            {},
            {"scheduler_cls": Scheduler},
            "scheduler_cls=Scheduler: takes the place of the one that bounds streams; accepted "
            "with sinks is None",
        ),
        (
            {"window_tokens": 60},
            {"enable_prompt_embeds": True},
            "enable_prompt_embeds=True: not supported with sinks; accepted is False",
        ),
    ],
    ids=str,
)
def test_what_streams_could_not_be_compacted_with_is_refused(
    configure: Configure, sink: dict[str, Any], arguments: dict[str, Any], sentence: str
) -> None:
    assert sentence_of(configure, LLAMA, FITS | sink, **arguments) == sentence


def test_an_engine_that_evicts_nothing_keeps_vllms_scheduler(configure: Configure) -> None:
    own = {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler", "enable_prompt_embeds": True}
    full = configure(LLAMA, {"policy": "full"}, **own)
    assert full.scheduler_config.scheduler_cls == own["scheduler_cls"]
    assert configure(LLAMA, additional_config={}).scheduler_config.scheduler_cls is None


def test_streams_have_a_scheduler_of_ours(configure: Configure) -> None:
    scheduler = configure(LLAMA, FITS).scheduler_config.get_scheduler_cls()
    assert scheduler is SinkScheduler


def test_a_compiled_pipeline_is_accepted_on_a_cpu(configure: Configure) -> None:
    configure(LLAMA, FITS, pipeline_parallel_size=2, enforce_eager=False)


@pytest.mark.parametrize(
    ("setting", "value", "accepted"),
    [
        ("decode_context_parallel_size", 2, "is 1"),
        ("prefill_context_parallel_size", 2, "is 1"),
        ("enable_dbo", True, "is False"),
        ("ubatch_size", 2, "are 0, 1"),
    ],
)
def test_split_steps_are_refused(
    configure: Configure, setting: str, value: int, accepted: str
) -> None:
    """On one CPU vLLM refuses or ignores them first, so they are set behind vLLM's back."""
    config = configure(LLAMA, FITS)
    setattr(config.parallel_config, setting, value)
    sentence = f"^{setting}={value}: not supported with sinks; accepted {accepted}$"
    with pytest.raises(SettingsError, match=sentence):
        check(config, settings_of(config))


@pytest.mark.parametrize(
    ("platform", "accepted"), [("cpu", True), ("cuda", True), ("rocm", False), ("xpu", False)]
)
def test_platforms(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, platform: str, accepted: bool
) -> None:
    config = configure(LLAMA, {"policy": "full"})
    monkeypatch.setattr(CpuPlatform, "device_name", platform)
    sentence = f"^device={platform}: not supported with sinks; accepted are cpu, cuda$"
    with nullcontext() if accepted else pytest.raises(SettingsError, match=sentence):
        check(config, settings_of(config))


@pytest.mark.parametrize(
    ("attention", "refused"),
    [
        ({}, "auto"),
        ({"backend": "FLASH_ATTN"}, "FLASH_ATTN"),
        ({"backend": "CUSTOM", "backend_per_kind": {"full_attention": "TRITON_ATTN"}}, "TRITON_"),
        ({"backend": "CUSTOM"}, None),
        ({"backend_per_kind": {"full_attention": "CUSTOM"}}, None),
        ({"backend": "CUSTOM", "backend_per_kind": {"sliding_window": "FLASH_ATTN"}}, None),
    ],
    ids=str,
)
def test_a_gpu_needs_our_backend(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    attention: dict[str, Any],
    refused: str | None,
) -> None:
    config = configure(LLAMA, FITS, attention_config=attention)
    monkeypatch.setattr(CpuPlatform, "is_cuda", lambda _: True)
    sentence = f"^attention_backend={refused}.*: would evict nothing; .* on a GPU is CUSTOM$"
    with pytest.raises(SettingsError, match=sentence) if refused else nullcontext():
        check(config, settings_of(config))


@pytest.mark.parametrize(("dtype", "accepted"), [("fp8", True), ("fp8_e5m2", False)])
def test_a_gpu_stores_fp8(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, dtype: str, accepted: bool
) -> None:
    config = configure(LLAMA, FITS)
    config.cache_config.cache_dtype = dtype
    monkeypatch.setattr(CpuPlatform, "device_name", "cuda")
    sentence = f"^kv_cache_dtype={dtype}: .*; accepted are auto, fp8, fp8_e4m3$"
    with nullcontext() if accepted else pytest.raises(SettingsError, match=sentence):
        check(config, settings_of(config))


def test_a_gpu_needs_no_backend_of_ours_to_evict_nothing(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(LLAMA, {"policy": "full"})
    monkeypatch.setattr(CpuPlatform, "is_cuda", lambda _: True)
    check(config, settings_of(config))

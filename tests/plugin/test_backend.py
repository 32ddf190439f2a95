"""Which classes the backend hands out, by the settings of the engine being built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from vllm import EngineArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec

from vllm_sink.attention.interface import Batch
from vllm_sink.plugin.backend import (
    SinkAttentionImpl,
    SinkBackend,
    SinkMetadataBuilder,
    _positions,
)
from vllm_sink.plugin.spec import SinkSpec
from vllm_sink.settings import SettingsError

SHAPE: dict[str, Any] = {
    "block_size": 32,
    "num_kv_heads": 2,
    "head_size": 32,
    "dtype": torch.float32,
}
FULL = FullAttentionSpec(**SHAPE)
SLIDING = SlidingWindowSpec(**SHAPE, sliding_window=48)


@pytest.fixture(autouse=True)
def fresh_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SinkBackend, "settings", None)


def impl_of(additional: dict[str, Any]) -> type:
    with set_current_vllm_config(VllmConfig(additional_config=additional)):
        return SinkBackend.get_impl_cls()


def test_unconfigured_hands_out_the_classes_of_vllm() -> None:
    assert impl_of({}) is CPUAttentionBackendImpl
    assert SinkBackend.get_builder_cls() is CPUAttentionMetadataBuilder
    assert SinkBackend.customize_spec(FULL) is FULL


def test_an_unconfigured_engine_after_a_configured_one_is_stock() -> None:
    assert impl_of({"sink": {}}) is SinkAttentionImpl
    assert impl_of({}) is CPUAttentionBackendImpl
    assert SinkBackend.customize_spec(FULL) is FULL


def test_configured_hands_out_ours() -> None:
    assert impl_of({"sink": {"sink_tokens": 5, "window_tokens": 59}}) is SinkAttentionImpl
    assert SinkBackend.get_builder_cls() is SinkMetadataBuilder
    expected = SinkSpec(**SHAPE, sliding_window=59, sink_tokens=5, dcp_sharded=False)
    assert SinkBackend.customize_spec(FULL) == expected


def test_full_policy_keeps_the_kernel_and_the_spec() -> None:
    assert impl_of({"sink": {"policy": "full"}}) is CPUAttentionBackendImpl
    assert SinkBackend.customize_spec(FULL) is FULL


def test_window_policy_has_no_sinks() -> None:
    impl_of({"sink": {"policy": "window", "sink_tokens": 5, "window_tokens": 64}})
    spec = SinkBackend.customize_spec(FULL)
    assert isinstance(spec, SinkSpec)
    assert (spec.sink_tokens, spec.sliding_window) == (0, 64)


@pytest.mark.parametrize("spec", [SLIDING], ids=["sliding"])
def test_layers_with_a_window_of_their_own_keep_it(spec: AttentionSpec) -> None:
    impl_of({"sink": {}})
    assert SinkBackend.customize_spec(spec) is spec


def test_learned_sinks_are_refused(tmp_path: Path) -> None:
    """No accepted architecture has them; another's would be caught here all the same."""
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    config = EngineArgs(
        str(tmp_path), skip_tokenizer_init=True, additional_config={"sink": {}}
    ).create_engine_config()
    with (
        set_current_vllm_config(config),
        pytest.raises(SettingsError, match=r"^sink\.policy='sink': .*learned sinks; accepted are "),
    ):
        SinkAttentionImpl(2, 32, 0.2, 1, None, None, "auto", sinks=torch.zeros(2))


def test_positions_of_a_mixed_batch() -> None:
    """A chunk of three that ends at 10, a decode step at 99, a fresh prompt of two."""
    starts = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    lens = torch.tensor([10, 100, 2], dtype=torch.int32)
    batch = Batch(starts, lens, torch.zeros(3, 4, dtype=torch.int32), 3)
    assert _positions(batch).tolist() == [7, 8, 9, 99, 0, 1]

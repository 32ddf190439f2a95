"""Which classes the backends hand out, by the settings of the engine being built, and what a step
tells their layers. The GPU's takes Triton: a GPU, or TRITON_INTERPRET=1.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from vllm import EngineArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec

from tests.attention.cases import needs_triton
from vllm_sink.attention.interface import Batch, SinkTurn
from vllm_sink.geometry import Geometry
from vllm_sink.plugin import probe, register
from vllm_sink.plugin.backend import SinkBackend, SinkMetadata, SinkMetadataBuilder, _positions
from vllm_sink.plugin.cpu_backend import CPUSinkBackend
from vllm_sink.plugin.presence import Vouched
from vllm_sink.plugin.spec import SinkSpec, Window
from vllm_sink.rotary import cos_sin
from vllm_sink.settings import SettingsError

SHAPE: dict[str, Any] = {
    "block_size": 32,
    "num_kv_heads": 2,
    "head_size": 32,
    "dtype": torch.float32,
}
FULL = FullAttentionSpec(**SHAPE)
SLIDING = SlidingWindowSpec(**SHAPE, sliding_window=48)
SINK = {"sink_tokens": 5, "window_tokens": 59}
LAYER = "layers.0.attn"


TRITON = pytest.param("triton", marks=needs_triton)


register()


@pytest.fixture(params=["cpu", TRITON])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[SinkBackend]:
    monkeypatch.setattr(SinkBackend, "settings", None)
    if request.param == "cpu":
        return CPUSinkBackend
    from vllm_sink.plugin.gpu_backend import GPUSinkBackend

    return GPUSinkBackend


def stock(backend: type[SinkBackend]) -> Any:
    """The backend of vLLM's that ours stands in front of."""
    return backend.__bases__[-1]


def impl_of(backend: type[SinkBackend], additional: dict[str, Any]) -> type:
    with set_current_vllm_config(VllmConfig(additional_config=additional)):
        return backend.get_impl_cls()


def test_unconfigured_hands_out_the_classes_of_vllm(backend: type[SinkBackend]) -> None:
    assert impl_of(backend, {}) is stock(backend).get_impl_cls()
    assert backend.get_builder_cls() is stock(backend).get_builder_cls()
    assert backend.customize_spec(FULL) is FULL


def test_an_unconfigured_engine_after_a_configured_one_is_stock(
    backend: type[SinkBackend],
) -> None:
    assert impl_of(backend, {"sink": {}}) is backend.impl_cls
    assert impl_of(backend, {}) is stock(backend).get_impl_cls()
    assert backend.customize_spec(FULL) is FULL


def test_configured_hands_out_ours(backend: type[SinkBackend]) -> None:
    assert impl_of(backend, {"sink": SINK}) is backend.impl_cls
    assert backend.get_builder_cls() is backend.builder_cls
    expected = SinkSpec(**SHAPE, sliding_window=Window(59), sink_tokens=5)
    assert backend.customize_spec(FULL) == expected


def test_full_policy_keeps_the_kernel_and_the_spec(backend: type[SinkBackend]) -> None:
    assert impl_of(backend, {"sink": {"policy": "full"}}) is stock(backend).get_impl_cls()
    assert backend.customize_spec(FULL) is FULL


def test_window_policy_has_no_sinks(backend: type[SinkBackend]) -> None:
    impl_of(backend, {"sink": {"policy": "window", "sink_tokens": 5, "window_tokens": 64}})
    spec = backend.customize_spec(FULL)
    assert isinstance(spec, SinkSpec)
    assert spec.geometry == Geometry(0, 64)


def test_layers_with_a_window_of_their_own_keep_it(backend: type[SinkBackend]) -> None:
    impl_of(backend, {"sink": {}})
    assert backend.customize_spec(SLIDING) is SLIDING


@pytest.fixture
def config(tmp_path: Path) -> VllmConfig:
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return EngineArgs(
        str(tmp_path),
        skip_tokenizer_init=True,
        max_num_batched_tokens=64,
        max_model_len=64,
        additional_config={"sink": SINK},
    ).create_engine_config()


def impl(
    backend: type[SinkBackend],
    config: VllmConfig,
    window: int | None,
    kv_cache_dtype: str = "auto",
    **named: Any,
) -> Any:
    with set_current_vllm_config(config):
        return backend.get_impl_cls()(2, 32, 0.2, 1, None, window, kv_cache_dtype, **named)


def test_learned_sinks_are_read_once_loaded(backend: type[SinkBackend], config: VllmConfig) -> None:
    learned = impl(backend, config, None, sinks=torch.zeros(2, dtype=torch.bfloat16))
    learned.sinks += 1
    learned.process_weights_after_loading(torch.bfloat16)
    assert torch.equal(learned.scoring.sink_logits, torch.ones(2))
    plain = impl(backend, config, None)
    plain.process_weights_after_loading(torch.bfloat16)
    assert plain.scoring.sink_logits is None


def test_a_cache_that_a_checkpoint_asks_for_is_refused_too(
    backend: type[SinkBackend], config: VllmConfig
) -> None:
    with pytest.raises(
        SettingsError, match=r"^kv_cache_dtype=fp8: .*; accepted with sinks are auto$"
    ):
        impl(backend, config, None, kv_cache_dtype="fp8")


def test_a_layer_knows_a_window_of_its_own(backend: type[SinkBackend], config: VllmConfig) -> None:
    assert not impl(backend, config, window=None).has_own_window
    assert impl(backend, config, window=48).has_own_window
    assert impl(backend, config, window=1).has_own_window


def builder_of(
    backend: type[SinkBackend],
    config: VllmConfig,
    device: str = "cpu",
    spec: AttentionSpec = FULL,
) -> SinkMetadataBuilder:
    """For one layer of a Llama."""
    with set_current_vllm_config(config):
        owner = nn.Module()
        owner.rotary_emb = get_rope(32, 64, True, {"rope_type": "default", "rope_theta": 1e4})
        owner.attn = Attention(2, 32, 0.2, 2, cache_config=config.cache_config, prefix=LAYER)
        backend.get_impl_cls()
        owner.to(device)
        probe._turns[owner.attn] = probe.Turn(owner.rotary_emb, is_neox_style=True)
        customized = backend.customize_spec(spec)
        return backend.get_builder_cls()(customized, [LAYER], config, torch.device(device))


def step(lengths: list[tuple[int, int]], device: str = "cpu") -> CommonAttentionMetadata:
    """Of requests with (queries of this step, tokens of the stream)."""
    queries = torch.tensor([queries for queries, _ in lengths])
    starts = torch.tensor([0, *queries.cumsum(0)], dtype=torch.int32)
    tokens = int(queries.sum())
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([tokens for _, tokens in lengths], dtype=torch.int32).to(device),
        num_reqs=len(lengths),
        num_actual_tokens=tokens,
        max_query_len=int(queries.max()),
        max_seq_len=max(tokens for _, tokens in lengths),
        block_table_tensor=torch.zeros(len(lengths), 8, dtype=torch.int32).to(device),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64).to(device),
    )


def turn_of(metadata: SinkMetadata) -> SinkTurn:
    return metadata.turns[LAYER]


def test_sinks_are_turned_back_by_what_was_evicted(
    backend: type[SinkBackend], config: VllmConfig
) -> None:
    builder = builder_of(backend, config)
    (rotary,) = builder.rows
    turn = turn_of(builder.build(0, step([(3, 70), (1, 100), (2, 2)])))
    evicted = torch.tensor([4, 5, 6, 36, 0, 0])
    assert turn.is_neox_style
    assert torch.equal(turn.rows, cos_sin(-evicted, rotary.inv_freq))


@pytest.mark.parametrize("spec", [FULL, SLIDING], ids=["sinks", "a window of its own"])
def test_a_step_begins_in_the_rotary(
    backend: type[SinkBackend],
    config: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
    spec: AttentionSpec,
) -> None:
    """In one buffer, whose rows of tokens that are not there nobody reads.

    A rank of a pipeline may have nothing but layers with windows of their own.
    """
    monkeypatch.setattr(stock(backend).get_builder_cls(), "build", lambda *_: None)
    builder = builder_of(backend, config, spec=spec)
    (rotary,) = builder.step_rotaries
    assert rotary.step_rows is not None
    place = rotary.step_rows.data_ptr()
    for lengths, positions in (
        ([(3, 70), (1, 100)], [67, 68, 69, 99]),
        ([(1, 10**6), (2, 2)], [10**6 - 1, 0, 1]),
    ):
        builder.build(0, step(lengths))
        expected = rotary.rows(torch.tensor(positions), rotary.step_rows.dtype)
        assert torch.equal(rotary.step_rows[: len(positions)], expected)
    assert rotary.step_rows.data_ptr() == place


def test_rows_stay_where_a_cuda_graph_found_them(
    backend: type[SinkBackend], config: VllmConfig
) -> None:
    builder = builder_of(backend, config)
    captured = builder.build_for_cudagraph_capture(step([(1, 1), (1, 1), (1, 9), (1, 1)]))
    assert len(turn_of(captured).rows) == 4
    replayed = builder.build(0, step([(1, 200), (1, 300)]))
    assert turn_of(replayed).rows.data_ptr() == turn_of(captured).rows.data_ptr()
    assert captured.batch.seq_lens.tolist() == [1, 1, 9, 1]


def test_building_a_step_does_not_wait_for_the_device(
    backend: type[SinkBackend], config: VllmConfig
) -> None:
    """On PyTorch's meta device nothing has values: to read one is an error."""
    builder = builder_of(backend, config, "meta")
    turn = turn_of(builder.build(0, step([(3, 70), (1, 10**6)], "meta")))
    assert turn.rows.shape == (4, 32)
    with pytest.raises(RuntimeError, match="meta"):
        turn.rows.sum().item()


def test_without_sinks_nothing_is_turned(backend: type[SinkBackend], config: VllmConfig) -> None:
    config.additional_config = {"sink": Vouched({"policy": "window", "window_tokens": 60})}
    assert builder_of(backend, config).build(0, step([(1, 100)])).turns == {}


def test_positions_of_a_mixed_batch() -> None:
    """A chunk of three that ends at 10, a decode step at 99, a fresh prompt of two, padding."""
    starts = torch.tensor([0, 3, 4, 6, 6], dtype=torch.int32)
    lens = torch.tensor([10, 100, 2, 0], dtype=torch.int32)
    batch = Batch(starts, lens, torch.zeros(4, 4, dtype=torch.int32), 3)
    assert _positions(batch, tokens=6).tolist() == [7, 8, 9, 99, 0, 1]
    assert _positions(batch, tokens=9).tolist()[:6] == [7, 8, 9, 99, 0, 1]


@pytest.mark.parametrize("backend", [TRITON], indirect=True)
def test_a_gpu_reads_fp8_by_the_scales_of_the_layer(
    backend: type[SinkBackend], config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuPlatform, "device_name", "cuda")
    layer = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.25))
    storage = torch.zeros(3, 1, 16, 64, dtype=torch.uint8)
    fp8 = impl(backend, config, None, kv_cache_dtype="fp8")
    cache = fp8.cache_of(layer, storage)
    assert cache.keys.dtype == cache.values.dtype == torch.float8_e4m3fn
    assert cache.values.data_ptr() == storage.data_ptr() + 32
    assert (cache.key_scale, cache.value_scale) == (layer._k_scale, layer._v_scale)
    assert not fp8.supports_quant_query_input
    assert impl(backend, config, None).cache_of(layer, storage.float()).key_scale is None


@pytest.mark.parametrize("backend", [TRITON], indirect=True)
def test_a_gpu_finds_ours_by_the_name_of_the_flag(backend: type[SinkBackend]) -> None:
    assert AttentionBackendEnum.CUSTOM.get_class() is backend
    assert backend.get_name() == AttentionBackendEnum.CUSTOM.name


@pytest.mark.parametrize("backend", [TRITON], indirect=True)
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, None),
        ({"kv_cache_dtype": "fp8"}, None),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_rswa": True}, "R-SWA"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
    ],
    ids=str,
)
def test_vllm_hears_what_ours_cannot(
    backend: type[SinkBackend], asked: dict[str, Any], reason: str | None
) -> None:
    usual = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
    }
    reasons = backend.validate_configuration(**(usual | asked))
    assert reason in reasons[0] if reason else reasons == []

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
)
from vllm.config import CompilationConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding as stock
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms.cpu import CpuPlatform

from vllm_sink.plugin import register
from vllm_sink.plugin.rotary import (
    Replacement,
    UnboundedLongRoPE,
    UnboundedRotary,
)
from vllm_sink.settings import SettingsError

FAR = [10**6, 4 * 10**6, 10**9]
HEAD_SIZE, MAX_POSITION, ORIGINAL = 64, 2048, 512

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 64 for i in range(HEAD_SIZE // 2)],
    "long_factor": [1.0 + i / 4 for i in range(HEAD_SIZE // 2)],
    "original_max_position_embeddings": ORIGINAL,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "mixed-ntk": {"rope_type": "ntk", "factor": 4.0, "mixed_b": 0.625},
    "dynamic-factor": {"rope_type": "dynamic", "factor": 2.0, "max_trained_positions": ORIGINAL},
    "dynamic-alpha": {"rope_type": "dynamic", "alpha": 1000.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-factor": {**YARN, "attention_factor": 1.25, "truncate": False},
    "longrope": LONGROPE,
    "longrope-mscale": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
    "partial-longrope": {
        **LONGROPE,
        "short_factor": LONGROPE["short_factor"][:24],
        "long_factor": LONGROPE["long_factor"][:24],
        "partial_rotary_factor": 0.75,
    },
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.25},
    "partial-llama3": {**LLAMA3, "partial_rotary_factor": 0.5},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "sections": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    "interleaved-sections": {
        "rope_type": "default",
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
    "sections-yarn": {**YARN, "mrope_section": [8, 12, 12]},
}
EVERY_ROPE = pytest.mark.parametrize("rope", ROPES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
KERNELS = pytest.mark.parametrize("custom_ops", ["all", "none"])

register()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(path)
    return path


@pytest.fixture
def engine(model_path: Path) -> Any:
    """The config of an engine being built: sink settings, or None where none are configured."""

    @contextmanager
    def building(
        sink: dict[str, Any] | None,
        max_model_len: int = MAX_POSITION,
        custom_ops: str = "all",
        max_num_batched_tokens: int = 2048,
    ) -> Iterator[None]:
        config = VllmConfig(
            model_config=ModelConfig(
                str(model_path), skip_tokenizer_init=True, max_model_len=max_model_len
            ),
            compilation_config=CompilationConfig(custom_ops=[custom_ops]),
            additional_config={} if sink is None else {"sink": sink},
        )
        config.scheduler_config.max_num_batched_tokens = max_num_batched_tokens
        with set_current_vllm_config(config):
            yield

    return building


@pytest.fixture(autouse=True)
def fresh_cache() -> None:
    stock._ROPE_DICT.clear()


def rope_of(
    rope: str, dtype: torch.dtype = torch.float32, is_neox_style: bool = True
) -> UnboundedRotary:
    return get_rope(HEAD_SIZE, MAX_POSITION, is_neox_style, ROPES[rope], dtype)


def styles(rope: str) -> list[bool]:
    return [True] if "longrope" in rope else [True, False]


def batch(dtype: torch.dtype, count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions within every table above, queries of 9 heads, keys of 3."""
    draw = torch.Generator().manual_seed(0)
    positions = torch.randint(0, ORIGINAL, (count,), generator=draw)
    query = torch.randn(count, 9 * HEAD_SIZE, generator=draw).to(dtype)
    key = torch.randn(count, 3 * HEAD_SIZE, generator=draw).to(dtype)
    return positions, query, key


def turn(
    rotary: nn.Module, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's turn in a step of tokens at `positions`."""
    if isinstance(rotary, Replacement):
        rotary.keep_step_rows(len(positions), rotary.table_dtype)
        rotary.begin_step(positions)
    return rotary(positions, query, key)


def table_of(rotary: nn.Module) -> torch.Tensor:
    """Stock's rows, from position 0 on."""
    if "long_short_cos_sin_cache" in rotary._buffers:
        skipped = ORIGINAL if rotary.use_long_rope else 0
        return rotary.long_short_cos_sin_cache[skipped:]
    return rotary.cos_sin_cache


@EVERY_ROPE
def test_rows_equal_float64_far_out(engine: Any, rope: str) -> None:
    with engine({}):
        rotary = rope_of(rope)
    assert rotary.inv_freq.dtype == torch.float32
    angles = np.outer(np.array(FAR, np.float64), rotary.inv_freq.numpy().astype(np.float64))
    expected = rotary.magnitude * np.concatenate((np.cos(angles), np.sin(angles)), axis=1)
    rows = rotary.rows(torch.tensor(FAR), torch.float32).numpy()
    assert np.abs(rows - expected).max() <= 2e-6


@EVERY_ROPE
def test_rows_equal_stock_within_its_table(engine: Any, rope: str) -> None:
    with engine(None):
        expected = table_of(rope_of(rope))[:ORIGINAL]
    with engine({}):
        rows = rope_of(rope).rows(torch.arange(ORIGINAL), torch.float32)
    # Stock multiplies in float32: half a unit in the last place of 512 radians.
    torch.testing.assert_close(rows, expected, atol=6e-5, rtol=0)


@KERNELS
@EVERY_DTYPE
@EVERY_ROPE
def test_forward_equals_stock_within_its_table(
    engine: Any, rope: str, dtype: torch.dtype, custom_ops: str
) -> None:
    tolerance = 3e-4 if dtype == torch.float32 else 0.04
    for is_neox_style in styles(rope):
        with engine(None, custom_ops=custom_ops):
            expected = turn(rope_of(rope, dtype, is_neox_style), *batch(dtype))
        with engine({}, custom_ops=custom_ops):
            turned = turn(rope_of(rope, dtype, is_neox_style), *batch(dtype))
        for got, want in zip(turned, expected, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@KERNELS
@EVERY_ROPE
def test_where_nobody_begins_steps_each_layer_makes_its_rows(
    engine: Any, rope: str, custom_ops: str
) -> None:
    with engine({}, custom_ops=custom_ops):
        rotary = rope_of(rope)
        found = rotary(*batch(torch.float32))
    assert rotary.step_rows is None
    torch.testing.assert_close(found, turn(rotary, *batch(torch.float32)), atol=2e-6, rtol=0)


@EVERY_DTYPE
@EVERY_ROPE
def test_kernel_and_native_forms_agree_far_out(engine: Any, rope: str, dtype: torch.dtype) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 0.04
    for is_neox_style in styles(rope):
        turned = []
        for custom_ops in ("all", "none"):
            stock._ROPE_DICT.clear()
            with engine({}, custom_ops=custom_ops):
                positions, query, key = batch(dtype)
                rotary = rope_of(rope, dtype, is_neox_style)
                turned += [turn(rotary, positions + 10**9, query, key)]
        for kernel, native in zip(*turned, strict=True):
            torch.testing.assert_close(kernel, native, atol=tolerance, rtol=0)


@KERNELS
@pytest.mark.parametrize("rope", [rope for rope in ROPES if "sections" in rope])
def test_text_has_one_position_in_all_sections(engine: Any, rope: str, custom_ops: str) -> None:
    positions, query, key = batch(torch.float32)
    with engine(None, custom_ops="none"):
        expected = rope_of(rope)(positions.expand(3, -1), query.clone(), key.clone())
    with engine({}, custom_ops=custom_ops):
        rotary = rope_of(rope)
    found = rotary(positions.expand(3, -1), query.clone(), key.clone())
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
    torch.testing.assert_close(found, rotary(positions, query, key), atol=2e-6, rtol=0)


@KERNELS
@EVERY_ROPE
def test_heads_may_be_a_dimension_of_their_own(engine: Any, rope: str, custom_ops: str) -> None:
    """Which is more than vLLM's kernel for CPUs gets right."""
    positions, query, key = batch(torch.float32)
    with engine({}, custom_ops=custom_ops):
        rotary = rope_of(rope)
    apart = [x.clone().unflatten(1, (-1, HEAD_SIZE)) for x in (query, key)]
    for found, expected in zip(
        rotary(positions, *apart), rotary(positions, query, key), strict=True
    ):
        torch.testing.assert_close(found.flatten(1), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("on_gpu", "sink"), [(True, {}), (False, {}), (True, None)], ids=str)
def test_a_gpu_computes_angles_once_a_token(
    engine: Any, monkeypatch: pytest.MonkeyPatch, on_gpu: bool, sink: dict[str, Any] | None
) -> None:
    """By vLLM's kernel, where Inductor would have it otherwise; stock keeps Inductor's way."""
    with engine(sink, custom_ops="none"):
        rotary = rope_of("default")
        monkeypatch.setattr(CpuPlatform, "is_cuda", lambda _: on_gpu)
        assert rotary.enabled() is (on_gpu and sink is not None)


@KERNELS
@EVERY_ROPE
def test_unconfigured_is_stock(engine: Any, rope: str, custom_ops: str) -> None:
    with engine(None, custom_ops=custom_ops):
        rotary = rope_of(rope)
    assert type(rotary).__module__.startswith("vllm.")
    assert not isinstance(rotary, UnboundedRotary)


@pytest.mark.slow
def test_unconfigured_numbers_are_those_of_vllm_without_us(tmp_path: Path) -> None:
    """Bit for bit, against a process that never registers."""
    script = """
import sys, torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
if sys.argv[2] == "registered":
    from vllm_sink.plugin.rotary import register
    register()
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
with set_current_vllm_config(VllmConfig()):
    rotary = get_rope(64, 2048, True, yarn, torch.bfloat16)
    code = (type(rotary), rotary._forward_method.__qualname__, rotary.name, rotary.enabled())
query, key = torch.randn(2, 100, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
torch.save([repr(code), rotary.cos_sin_cache, *rotary(torch.arange(100), query, key)], sys.argv[1])
"""
    found = []
    for kind in ("registered", "alone"):
        path = tmp_path / kind
        subprocess.run([sys.executable, "-c", script, path, kind], check=True)
        found.append(torch.load(path))
    (our_code, *our_numbers), (their_code, *their_numbers) = found
    assert our_code == their_code
    for ours, theirs in zip(our_numbers, their_numbers, strict=True):
        assert torch.equal(ours, theirs)


def test_engines_of_one_process_do_not_share_rotaries(engine: Any) -> None:
    with engine({}):
        first, again = rope_of("default"), rope_of("default")
    with engine(None):
        unconfigured = rope_of("default")
    with engine({"policy": "full"}, max_model_len=2048):
        evicting_nothing = rope_of("default")
    with engine({}, max_num_batched_tokens=64):
        in_smaller_steps = rope_of("default")
    assert first is again
    assert len({*map(id, (first, evicting_nothing, in_smaller_steps))}) == 3
    assert isinstance(first, UnboundedRotary)
    assert not isinstance(unconfigured, UnboundedRotary)


@pytest.mark.parametrize(
    ("sink", "is_long"),
    [
        ({"sink_tokens": 4, "window_tokens": ORIGINAL - 4}, False),
        ({"sink_tokens": 4, "window_tokens": ORIGINAL - 3}, True),
        ({"policy": "window", "sink_tokens": 4, "window_tokens": ORIGINAL}, False),
        ({"policy": "full", "sink_tokens": 4, "window_tokens": 8}, True),
    ],
)
@pytest.mark.parametrize("rope", ["longrope", "longrope-mscale"])
def test_longrope_chooses_like_a_stock_engine_of_the_visible_length(
    engine: Any, rope: str, sink: dict[str, Any], is_long: bool
) -> None:
    with engine(None, max_model_len=ORIGINAL + is_long):
        expected = table_of(rope_of(rope))[:ORIGINAL]
    stock._ROPE_DICT.clear()
    with engine(sink):
        rotary = rope_of(rope)
    assert isinstance(rotary, UnboundedLongRoPE)
    rows = rotary.rows(torch.arange(ORIGINAL), torch.float32)
    torch.testing.assert_close(rows, expected, atol=6e-5, rtol=0)


def test_several_linear_factors_are_refused(engine: Any) -> None:
    with engine({}), pytest.raises(SettingsError, match=r"linear scaling .* single factor"):
        stock.LinearScalingRotaryEmbedding(64, 64, 128, 10000.0, True, [1.0, 2.0], torch.float32)


def test_a_reader_of_the_table_fails(engine: Any) -> None:
    with engine({}):
        rotary = rope_of("default")
    with pytest.raises(AttributeError, match="cos_sin_cache"):
        _ = rotary.cos_sin_cache


def test_cos_and_sin_of_a_range_equal_stock(engine: Any) -> None:
    with engine(None):
        expected = rope_of("default").get_cos_sin(100)
    with engine({}):
        found = rope_of("default").get_cos_sin(100)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@KERNELS
@pytest.mark.parametrize("rope", ["yarn", "longrope", "partial"])
def test_compiled_equals_eager(engine: Any, rope: str, custom_ops: str) -> None:
    with engine({}, custom_ops=custom_ops):
        rotary = rope_of(rope)
    compiled = torch.compile(rotary, dynamic=True, fullgraph=True)
    positions = batch(torch.float32)[0] + 4 * 10**6
    expected = turn(rotary, positions, *batch(torch.float32)[1:])
    found = compiled(positions, *batch(torch.float32)[1:])
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)

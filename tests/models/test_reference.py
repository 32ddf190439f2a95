"""The reference from transformers' models: against the paper, and against plain models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import ROPE
from tests.engine.streaming_llm import StreamingLlama
from tests.engine.streaming_neox import StreamingNeoX
from vllm_sink.models.reference import Model, StreamingModel
from vllm_sink.models.tiny import DELTA, LONG_WINDOW, MAMBA, WINDOW, Recipe, model_of

CACHE = (5, 59)
TOLERANCE = 1e-9

LAYERS = 2
PARTIAL_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
ALIBI = {"alibi": True, "multi_query": False, "bias": True}
MAMBA_2 = {"mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 1, "ssm_state_size": 16}


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    random = torch.Generator().manual_seed(1)
    return torch.randint(128, (4 * sum(CACHE) + 9,), generator=random).tolist()


def saved(path: Path, model_type: str, **config: Any) -> Path:
    model_of(Recipe(model_type, config)).save_pretrained(path)
    return path


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("cache", [CACHE, (0, 33), (40, 1)])
def test_rotary_models_stream_as_in_the_paper(
    tmp_path: Path, tokens: list[int], rope: str, cache: tuple[int, int]
) -> None:
    path = saved(tmp_path, "llama", rope_parameters=ROPE[rope])
    want = StreamingLlama(path, *cache).log_probs(tokens)
    assert difference(StreamingModel(path, *cache).log_probs(tokens), want) <= TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("gpt_neox", {"rope_parameters": PARTIAL_ROTARY}), ("falcon", ALIBI)],
)
def test_other_decoders_stream_as_in_the_paper(
    tmp_path: Path, tokens: list[int], model_type: str, config: dict[str, Any]
) -> None:
    path = saved(tmp_path, model_type, **config)
    want = StreamingNeoX(path, *CACHE).log_probs(tokens)
    assert difference(StreamingModel(path, *CACHE).log_probs(tokens), want) <= TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("granitemoehybrid", MAMBA | {"layer_types": ["mamba"] * LAYERS, "num_local_experts": 0}),
        ("lfm2", {"layer_types": ["conv"] * LAYERS}),
        ("mamba", {}),
        ("nemotron_h", MAMBA_2 | {"layers_block_type": ["mamba"] * LAYERS}),
        ("ministral", {"layer_types": ["sliding_attention"] * LAYERS, "sliding_window": WINDOW}),
        ("gemma2", {"layer_types": ["sliding_attention"] * LAYERS, "sliding_window": LONG_WINDOW}),
        ("qwen3_5_text", DELTA | {"layer_types": ["linear_attention"] * LAYERS}),
    ],
)
def test_what_is_bounded_by_itself_stays_as_it_is(
    tmp_path: Path, tokens: list[int], model_type: str, config: dict[str, Any]
) -> None:
    """Layers with a state see all of the stream, and a sliding window its own, however long."""
    path = saved(tmp_path, model_type, **config)
    plain = Model(path).log_probs(tokens)
    assert difference(StreamingModel(path, *CACHE).log_probs(tokens), plain) <= TOLERANCE

"""Each recipe makes a checkpoint that tells right attention from wrong."""

import json
from pathlib import Path

import pytest
import torch
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

from vllm_sink.models.reference import Model, StreamingModel
from vllm_sink.models.tiny import FAULTS, RECIPES, save

SINKS, WINDOW = 3, 13
CACHE = SINKS + WINDOW
WITHOUT_ATTENTION = {"FalconMambaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM"}


def test_recipes_are_for_names_in_the_registry() -> None:
    assert FAULTS.keys() < RECIPES.keys() < _TEXT_GENERATION_MODELS.keys()


@pytest.mark.parametrize("architecture", RECIPES)
def test_a_recipe_makes_a_model_that_heeds_its_past(tmp_path: Path, architecture: str) -> None:
    path = save(architecture, tmp_path)
    assert json.loads((path / "config.json").read_text())["architectures"] == [architecture]
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(128, (3 * CACHE,), generator=random).tolist()
    model = Model(path)
    scores = model.log_probs(tokens)
    assert scores.isfinite().all()
    assert scores.std() > 0.5

    exchanged = model.log_probs([*reversed(tokens[:2]), *tokens[2:]])
    assert (scores - exchanged)[2:].abs().max() > 1e-3

    streamed = StreamingModel(path, SINKS, WINDOW).log_probs(tokens)
    torch.testing.assert_close(streamed[:CACHE], scores[:CACHE], rtol=0, atol=1e-9)
    forgot = (scores - streamed)[CACHE:].abs().max()
    assert forgot == 0 if architecture in WITHOUT_ATTENTION else forgot > 1e-2

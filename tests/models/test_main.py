"""One architecture of each kind through the command: what it finds, and what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_sink.models.page import TOLERANCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RIGHT = {
    "BloomForCausalLM": {"ALiBi": 2},
    "Cohere2ForCausalLM": {"rotated, a window of its own": 2, "no positions": 1},
    "Gemma3nForCausalLM": {"rotated, a window of its own": 2, "rotated": 2},
    "Glm4MoeForCausalLM": {"rotated": 2},
    "GptOssForCausalLM": {
        "rotated, a learned sink, a window of its own": 2,
        "rotated, a learned sink": 1,
    },
    "GraniteMoeHybridForCausalLM": {"a state": 1, "no positions": 1},
    "Ministral3ForCausalLM": {"rotated": 2},
}
REFUSED = {
    "DeepseekV3ForCausalLM": "its attention is multi-head latent",
    "OPTForCausalLM": "reads positions beside tokens",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_sink.models", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=800, env=env)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "models.md"
    ended = run(f"--output={path}", *RIGHT, *REFUSED)
    assert ended.returncode == 0, ended.stderr
    return path


@pytest.fixture(scope="module")
def found(page: Path) -> dict[str, Any]:
    return json.loads(page.with_suffix(".json").read_text())["found"]


@pytest.mark.parametrize("architecture", RIGHT)
def test_a_kind_of_layers_is_right(found: dict[str, Any], architecture: str) -> None:
    assert found[architecture]["layers"] == RIGHT[architecture]
    assert found[architecture]["error"] <= TOLERANCE
    assert found[architecture]["cached"] > 0


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_kind_is_refused(found: dict[str, Any], architecture: str) -> None:
    assert REFUSED[architecture] in found[architecture]["refused"]


def test_the_page_has_a_row_of_each(page: Path) -> None:
    text = page.read_text()
    assert f"## Right: {len(RIGHT)}" in text
    assert f"## Refused: {len(REFUSED)}" in text
    assert "## Not shown to be right: 0" in text
    assert all(f"| {architecture} |" in text for architecture in RIGHT | REFUSED)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    ended = run(f"--output={tmp_path}/none/models.md")
    assert ended.returncode == 2
    assert "accepted is a file in a folder that exists" in ended.stderr


def test_an_unknown_architecture() -> None:
    ended = run("--output=models.md", "LlamaForCausalLN")
    assert ended.returncode == 2
    assert "LlamaForCausalLN: not one that is made tiny; accepted are " in ended.stderr

"""vLLM as a user starts it: its own processes, nothing set but `max_model_len`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPTNeoXConfig

from vllm_sink.settings import SettingsError

from .conftest import TRAINED_CONTEXT, Checkpoint, Engine
from .test_families import FAMILIES, SIZES

pytestmark = pytest.mark.slow

PLAIN = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    sink = json.loads(sys.argv[2])
    llm = LLM(
        sys.argv[1], skip_tokenizer_init=True, max_model_len=512, additional_config={"sink": sink}
    )
    parameters = SamplingParams(max_tokens=200, ignore_eos=True, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": list(range(100))}, parameters, use_tqdm=False)
    print("tokens:", len(output.outputs[0].token_ids))
"""


def run(script: Path, checkpoint: Path, sink: str) -> subprocess.CompletedProcess[str]:
    script.write_text(PLAIN)
    environment = dict(os.environ)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, script, checkpoint, sink],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_plain_vllm_serves(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Compiled, in an engine process of its own, past the window."""
    sink = '{"sink_tokens": 4, "window_tokens": 60}'
    done = run(tmp_path / "plain.py", checkpoint(), sink)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "tokens: 200" in done.stdout
    assert "Sinks S=4, window W=60 tokens" in done.stdout + done.stderr


def test_plain_vllm_names_a_bad_setting(checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = run(tmp_path / "plain.py", checkpoint(), '{"window_tokens": 4096}')
    assert done.returncode == 1
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert last.startswith("vllm_sink.settings.SettingsError: sink.sink_tokens + ")
    assert f"accepted up to {TRAINED_CONTEXT}" in last


def test_positions_that_change_with_the_stream_are_refused(engine: Engine, tmp_path: Path) -> None:
    """Found out from the model as built: its config alone does not tell."""
    sizes = SIZES | FAMILIES["gpt-neox"].config
    rope = sizes["rope_parameters"] | {"rope_type": "dynamic", "factor": 2.0}
    # A config alone: once vLLM has loaded a model of transformers' own, it can be built no more.
    config = GPTNeoXConfig(**sizes | {"rope_parameters": rope})
    config.architectures = ["GPTNeoXForCausalLM"]
    config.save_pretrained(tmp_path)
    with (
        pytest.raises(
            SettingsError,
            match=r"its layer .* changes queries or keys by position in a way of its own",
        ),
        engine(tmp_path, {"sink_tokens": 4, "window_tokens": 60}, load_format="dummy"),
    ):
        pass

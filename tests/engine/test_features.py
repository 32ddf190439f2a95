"""What users switch on beside sinks: past the window and across compactions as without it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_sink import embedded
from vllm_sink.buffer import Buffer
from vllm_sink.models import tiny

from .conftest import Checkpoint, Engine
from .streaming_llm import StreamingLlama
from .test_exact import TOLERANCE, generate, log_probs_of, prompts, tokens_of

pytestmark = pytest.mark.slow

SINKS, WINDOW = 4, 28
SINK = {"sink_tokens": SINKS, "window_tokens": WINDOW}
LENGTH = 128
# In a process of its own: drafting loads numba, beside which vLLM 0.32 can start no other engine.
DRAFTING = """
import json, sys
from vllm import LLM, SamplingParams

path, sink, length, texts, count = json.load(sys.stdin)
llm = LLM(
    path, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, block_size=32,
    max_model_len=length, additional_config={"sink": sink}, disable_log_stats=False,
    speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
)
parameters = SamplingParams(
    max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0
)
outputs = llm.generate([{"prompt_token_ids": text} for text in texts], parameters, use_tqdm=False)
answers = [output.outputs[0] for output in outputs]
(accepted,) = (m.value for m in llm.get_metrics() if m.name.endswith("_accepted_tokens"))
print(json.dumps([accepted, [
    [list(answer.token_ids), [l[t].logprob for t, l in zip(answer.token_ids, answer.logprobs)]]
    for answer in answers
]]))
"""


def greedy(llm: Any, texts: list[list[int]], tokens: int) -> list[Any]:
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0
    )
    requests = [{"prompt_token_ids": text} for text in texts]
    return llm.generate(requests, parameters, use_tqdm=False)


def drafted(
    path: Path, sink: dict[str, Any], length: int, texts: list[list[int]], tokens: int
) -> list[tuple[list[int], torch.Tensor]]:
    """Answers and their log-probabilities, of an engine that drafts, much of it accepted."""
    given = json.dumps([str(path), sink, length, texts, tokens])
    command = [sys.executable, "-c", DRAFTING]
    ended = subprocess.run(command, input=given, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-4000:]
    accepted, answers = json.loads(ended.stdout.splitlines()[-1])
    assert accepted > 20
    return [(answer, torch.tensor(scores, dtype=torch.float64)) for answer, scores in answers]


def test_drafts_change_nothing(checkpoint: Checkpoint, engine: Engine) -> None:
    """What is rejected evicts nothing, and a mark stays where it is."""
    path, texts = checkpoint(initializer_range=0.05), prompts(30, 7, 80, seed=1)
    sink = SINK | {"compact_tokens": 90}
    with engine(path, sink, max_model_len=LENGTH) as llm:
        plain = greedy(llm, texts, 3 * LENGTH)
    for output, (answer, scores) in zip(
        plain, drafted(path, sink, LENGTH, texts, 3 * LENGTH), strict=True
    ):
        assert list(output.outputs[0].token_ids) == answer
        expected = torch.tensor(list(log_probs_of(output)), dtype=torch.float64)
        assert (scores - expected).abs().max() <= TOLERANCE


def test_drafted_streams_match_the_paper(checkpoint: Checkpoint) -> None:
    path, texts = checkpoint(initializer_range=0.05), prompts(50, 7, seed=2)
    reference = StreamingLlama(path, SINKS, WINDOW)
    answers = drafted(path, SINK, 65536, texts, 4 * (SINKS + WINDOW))
    for text, (answer, scores) in zip(texts, answers, strict=True):
        expected = reference.log_probs(text + answer)[-len(answer) :]
        assert (scores - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("caching", [False, True])
def test_states_begin_anew_at_the_mark(tmp_path: Path, engine: Engine, caching: bool) -> None:
    """The numbers of buffers that are compacted by hand, read as any prompt."""
    path = tiny.save("FalconH1ForCausalLM", tmp_path / "hybrid")
    buffer, (text,) = Buffer(SINKS, WINDOW, 90), prompts(30, seed=5)
    sink = SINK | {"compact_tokens": buffer.mark}
    with engine(path, sink, max_model_len=LENGTH, enable_prefix_caching=caching) as llm:
        (output,) = greedy(llm, [text], 3 * LENGTH)
        held, answer = list(text), []
        while len(answer) < 3 * LENGTH:
            (part,) = greedy(llm, [held], buffer.mark - len(held))
            answer += part.outputs[0].token_ids
            held = buffer.compact(tokens_of(part))
    assert list(output.outputs[0].token_ids) == answer[: 3 * LENGTH]


def quantised(path: Path, target: Path) -> Path:
    """Weights of 8 bits, a scale a row, as compressed-tensors keeps them; activations likewise."""
    weights = load_file(path / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().amax(dim=1, keepdim=True) / 127
        weights[name] = (weights[name] / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    target.mkdir()
    save_file(weights, target / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    of_rows = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    of_tokens = of_rows | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": of_rows, "input_activations": of_tokens}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_quantised_weights(checkpoint: Checkpoint, engine: Engine, tmp_path: Path) -> None:
    """Stock's numbers as far as nothing is evicted, and past it those of any other chunks."""
    path = quantised(checkpoint(), tmp_path / "quantised")
    (text,) = prompts(4 * (SINKS + WINDOW), seed=4)
    with engine(path, SINK, max_num_batched_tokens=17) as llm:
        (chunked,) = generate(llm, [text], max_tokens=20)
    with engine(path, SINK, max_num_batched_tokens=512) as llm:
        (at_once,) = generate(llm, [tokens_of(chunked)], max_tokens=1)
    with engine(path) as llm:
        assert llm.llm_engine.vllm_config.quant_config is not None
        (stock,) = generate(llm, [text[: SINKS + WINDOW]], max_tokens=1)
    one, other, plain = (
        torch.tensor(list(log_probs_of(output))) for output in (chunked, at_once, stock)
    )
    assert (one - other[:-1]).abs().max() <= TOLERANCE
    seen = SINKS + WINDOW - 1
    assert (one[:seen] - plain[:seen]).abs().max() <= 1e-5


def test_a_beam_of_one_is_greedy(checkpoint: Checkpoint, engine: Engine) -> None:
    from transformers import AutoTokenizer
    from vllm.sampling_params import BeamSearchParams

    path, (text,) = checkpoint(), prompts(50, seed=3)
    # Of its tokens, those that the model has.
    AutoTokenizer.from_pretrained(embedded.path()).save_pretrained(path)
    with engine(path, SINK, skip_tokenizer_init=False) as llm:
        (plain,) = greedy(llm, [text], 60)
        beams = BeamSearchParams(beam_width=1, max_tokens=60, ignore_eos=True)
        (found,) = llm.beam_search([{"prompt_token_ids": text}], beams)
    assert found.sequences[0].tokens == tokens_of(plain)

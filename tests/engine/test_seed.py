"""A seed gives the same tokens however the prompt is cut, and whoever else is served."""

from typing import Any

import pytest

from .conftest import VOCABULARY, Checkpoint, Engine, preempt_every

pytestmark = pytest.mark.slow

SINK = {"sink_tokens": 4, "window_tokens": 60}
PROMPTS = [[(7 * i + 3 * j) % VOCABULARY for i in range(20 + 5 * j)] for j in range(4)]
CHUNK = 16


def sampled(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    from vllm import SamplingParams

    parameters = [
        SamplingParams(seed=i, temperature=1.0, max_tokens=150, ignore_eos=True, detokenize=False)
        for i in range(len(prompts))
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_chunks_draw_nothing(checkpoint: Checkpoint, engine: Engine) -> None:
    with engine(checkpoint(), SINK, max_num_batched_tokens=2048) as llm:
        whole = sampled(llm, PROMPTS)
        assert sampled(llm, PROMPTS[:1]) == whole[:1]
        assert len({tuple(tokens) for tokens in whole}) == len(whole)
    with engine(checkpoint(), SINK, max_num_batched_tokens=CHUNK) as llm:
        assert sampled(llm, PROMPTS) == whole


def test_a_preemption_draws_nothing(checkpoint: Checkpoint, engine: Engine) -> None:
    with engine(checkpoint(), SINK, max_num_batched_tokens=CHUNK) as llm:
        undisturbed = sampled(llm, PROMPTS)
        preemptions = preempt_every(llm, 20)
        assert sampled(llm, PROMPTS) == undisturbed
        assert preemptions() > 10

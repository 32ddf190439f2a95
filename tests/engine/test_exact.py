"""Log-probabilities of real vLLM against the paper's method in float64, token by token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .conftest import VOCABULARY, Checkpoint, Engine, preempt_every
from .streaming_llm import StreamingLlama

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4


def prompts(*lengths: int, seed: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=random).tolist() for n in lengths]


def generate(
    llm: Any, texts: list[list[int]], max_tokens: int, score_prompts: bool = True
) -> list[Any]:
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0 if score_prompts else None,
    )
    requests = [{"prompt_token_ids": text} for text in texts]
    return llm.generate(requests, parameters, use_tqdm=False)


def tokens_of(output: Any) -> list[int]:
    return [*output.prompt_token_ids, *output.outputs[0].token_ids]


def log_probs_of(output: Any) -> Iterator[float]:
    """Of every token scored, in order: the prompt's (but its first) if asked for, the output's."""
    scored = (output.prompt_logprobs or [])[1:] + output.outputs[0].logprobs
    for token, candidates in zip(tokens_of(output)[-len(scored) :], scored, strict=True):
        yield candidates[token].logprob


def error(output: Any, reference: StreamingLlama) -> float:
    got = torch.tensor(list(log_probs_of(output)), dtype=torch.float64)
    want = reference.log_probs(tokens_of(output))[-len(got) :]
    return float((got - want).abs().max())


@dataclass(frozen=True)
class Case:
    rope: str
    kv_heads: int
    sinks: int
    window: int
    chunk: int
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def sink(self) -> dict[str, Any]:
        return {"sink_tokens": self.sinks, "window_tokens": self.window, **dict(self.settings)}

    @property
    def streams(self) -> int:
        """A chunk of one token leaves no room for a second request."""
        return min(self.chunk, 4)


CASES = [
    Case("default", kv_heads=2, sinks=5, window=97, chunk=17),
    Case("default", kv_heads=4, sinks=4, window=60, chunk=512),
    Case("default", kv_heads=2, sinks=40, window=57, chunk=1),
    Case("llama3", kv_heads=2, sinks=40, window=57, chunk=17),
    Case("llama3", kv_heads=4, sinks=5, window=97, chunk=512),
    Case("yarn", kv_heads=2, sinks=5, window=97, chunk=512),
    Case("yarn", kv_heads=4, sinks=33, window=31, chunk=17),
    Case("yarn", kv_heads=2, sinks=1, window=1, chunk=1),
    Case("default", kv_heads=2, sinks=0, window=65, chunk=17),
    Case("default", 2, 5, 59, 17, settings=(("reindex", False),)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_streams_match_the_paper(checkpoint: Checkpoint, engine: Engine, case: Case) -> None:
    path = checkpoint(case.rope, case.kv_heads)
    reindex = dict(case.settings).get("reindex", True)
    reference = StreamingLlama(path, case.sinks, case.window, reindex)
    cache = case.sinks + case.window
    lengths = (3 * cache + 7, cache - 1, 2 * cache, 11)[: case.streams]
    chunk = {"max_num_batched_tokens": case.chunk, "max_num_seqs": case.streams}
    with engine(path, case.sink, **chunk) as llm:
        outputs = generate(llm, prompts(*lengths, seed=case.chunk), max_tokens=cache + 20)
    assert len(tokens_of(outputs[0])) >= 4 * cache
    for output in outputs:
        assert error(output, reference) <= TOLERANCE


def test_window_policy_has_no_sinks(checkpoint: Checkpoint, engine: Engine) -> None:
    path = checkpoint()
    sink = {"policy": "window", "sink_tokens": 4, "window_tokens": 60}
    with engine(path, sink, max_num_batched_tokens=64) as llm:
        (output,) = generate(llm, prompts(200, seed=1), max_tokens=60)
    assert error(output, StreamingLlama(path, sinks=0, window=60)) <= TOLERANCE


def test_full_policy_evicts_nothing_past_the_trained_context(
    checkpoint: Checkpoint, engine: Engine
) -> None:
    path = checkpoint(max_position_embeddings=64)
    with engine(path, {"policy": "full"}, max_num_batched_tokens=64) as llm:
        (output,) = generate(llm, prompts(200, seed=1), max_tokens=60)
    assert error(output, StreamingLlama(path, sinks=0, window=1000)) <= TOLERANCE


@pytest.mark.parametrize(("sinks", "chunk"), [(5, 17), (40, 512)])
def test_prefix_hits_match_the_paper(
    checkpoint: Checkpoint, engine: Engine, sinks: int, chunk: int
) -> None:
    """Hits inside the cache, past the window, and into a stream that is still running."""
    path = checkpoint("llama3")
    window = 91
    reference = StreamingLlama(path, sinks, window)
    sink = {"sink_tokens": sinks, "window_tokens": window}
    (first,) = prompts(400, seed=2)
    tails = prompts(9, 40, 70, 33, seed=3)
    caching = {"enable_prefix_caching": True, "max_num_batched_tokens": chunk, "max_num_seqs": 4}
    with engine(path, sink, **caching) as llm:
        (seen,) = generate(llm, [first], max_tokens=60, score_prompts=False)
        again = [
            first[:70] + tails[0],
            first[:350] + tails[1],
            tokens_of(seen)[:455] + tails[2],
            tokens_of(seen)[:455] + tails[2] + tails[3],
        ]
        outputs = generate(llm, again, max_tokens=2 * window, score_prompts=False)
    hits = [output.num_cached_tokens for output in outputs]
    assert hits[0] == 64
    assert hits[1] > sinks + window
    assert hits[2] > 400
    for output in (seen, *outputs):
        assert error(output, reference) <= TOLERANCE


def test_hit_needs_its_sinks(checkpoint: Checkpoint, engine: Engine) -> None:
    """With its sinks evicted from the prefix cache, a cached window is no hit."""
    path = checkpoint()
    sink = {"sink_tokens": 4, "window_tokens": 60}
    (first,) = prompts(300, seed=4)
    with engine(path, sink, enable_prefix_caching=True) as llm:
        generate(llm, [first], max_tokens=2, score_prompts=False)
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        block_hash, sink_block = next(
            (block.block_hash, block)
            for block in pool.blocks
            if block.block_hash is not None and block.block_hash_num_tokens == 32
        )
        assert block_hash is not None
        pool.evict_blocks({sink_block.block_id})
        (output,) = generate(llm, [first], max_tokens=100, score_prompts=False)
    assert output.num_cached_tokens == 0
    assert error(output, StreamingLlama(path, 4, 60)) <= TOLERANCE


@pytest.mark.parametrize("caching", [False, True])
def test_preempted_streams_match_the_paper(
    checkpoint: Checkpoint, engine: Engine, caching: bool
) -> None:
    path = checkpoint()
    sink = {"sink_tokens": 5, "window_tokens": 97}
    options = {"max_num_batched_tokens": 32, "enable_prefix_caching": caching}
    with engine(path, sink, **options) as llm:
        preemptions = preempt_every(llm, 50)
        outputs = generate(llm, prompts(20, 25, 30, 35, seed=5), 400, score_prompts=False)
    assert preemptions() > 10
    for output in outputs:
        assert error(output, StreamingLlama(path, 5, 97)) <= TOLERANCE

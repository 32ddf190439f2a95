"""One model over two workers: the same numbers as in one, whatever splits it and starts them.

Of vLLM's executors its CPU platform takes `mp` for that. With Ray's it ends ("current platform cpu
does not support ray"), since it names no resource that Ray would give a worker. Here it names one,
and all the rest of that executor is what runs on GPUs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from .conftest import Checkpoint, Engine
from .test_endless import BUFFER, LENGTH, SINK, parameters
from .test_exact import TOLERANCE, prompts

pytestmark = pytest.mark.slow

ENGINE = {
    "max_model_len": LENGTH,
    "max_num_batched_tokens": 48,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 256,
}
SPLITS = {
    "TP=2": {"tensor_parallel_size": 2},
    # Compiled, but to no code: eager, vLLM's CPU build fails at its first step.
    "PP=2": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"},
    },
}
WORKERS = 2


@dataclass
class Answer:
    tokens: list[int]
    log_probs: list[float]
    cached: int | None
    """Tokens of the prompt, in the prefix cache."""


def answers(llm: Any) -> list[Answer]:
    """Streams in one batch, compacted twice and more, and then prompts that begin as theirs did.

    The last one of the batch has a seed, and a prompt of several chunks.
    """
    texts = prompts(30, 5, LENGTH - 1, 100, seed=1)
    greedy = parameters(max_tokens=4 * BUFFER.kept, logprobs=0)
    seeded = parameters(max_tokens=4 * BUFFER.kept, logprobs=0, temperature=1.0, seed=7)
    streams = generate(llm, texts, [greedy, greedy, greedy, seeded])
    turns = [texts[0] + streams[0].tokens[: BUFFER.mark - 40], texts[2][:100] + texts[1]]
    return streams + generate(llm, turns, [parameters(max_tokens=40, logprobs=0)] * len(turns))


def generate(llm: Any, texts: list[list[int]], asked: list[Any]) -> list[Answer]:
    inputs = [{"prompt_token_ids": text} for text in texts]
    given = []
    for output in llm.generate(inputs, asked, use_tqdm=False):
        tokens, rows = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        scores = [row[token].logprob for token, row in zip(tokens, rows, strict=True)]
        given.append(Answer(tokens, scores, output.num_cached_tokens))
    return given


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint, engine: Engine) -> list[Answer]:
    """What one worker answers."""
    with engine(checkpoint(), SINK, **ENGINE) as llm:
        return answers(llm)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A Ray instance of its own, in which CPUs are called GPUs."""
    import ray
    from vllm.platforms.cpu import CpuPlatform

    def name_cpus() -> None:
        """In a process of Ray's."""
        from vllm.platforms.cpu import CpuPlatform

        CpuPlatform.ray_device_key = "GPU"

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(prefix="ray-") as folder:
        patch.setattr(CpuPlatform, "ray_device_key", "GPU")
        ray.init(
            address="local",
            num_cpus=1,
            # vLLM does not give back what it reserves for an engine.
            num_gpus=WORKERS * len(SPLITS),
            include_dashboard=False,
            object_store_memory=2**27,
            runtime_env={"worker_process_setup_hook": name_cpus},
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        yield
        ray.shutdown()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_two_workers_answer_as_one(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Checkpoint,
    engine: Engine,
    alone: list[Answer],
    executor: str,
    split: str,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if executor == "ray":
        request.getfixturevalue("ray")
    settings = ENGINE | SPLITS[split] | {"distributed_executor_backend": executor}
    with engine(checkpoint(), SINK, **settings) as llm:
        together = answers(llm)
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    for one, two in zip(alone, together, strict=True):
        assert two.tokens == one.tokens
        assert two.log_probs == pytest.approx(one.log_probs, abs=TOLERANCE)
        assert two.cached == one.cached
    assert [answer.cached for answer in together[-2:]] == [64, 96]

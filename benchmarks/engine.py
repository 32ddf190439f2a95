"""Real vLLM engines, each in a process of its own on one core, that take turns.

Two arms of a comparison share the core and never run at the same time, so that whatever else the
machine does meets both alike.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import psutil
from rich.progress import Progress

P = ParamSpec("P")
T = TypeVar("T")

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Scheduler and model in one process: nothing of an idle arm runs.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass(frozen=True)
class Memory:
    kv_blocks: int
    """Blocks that are not free, of all streams."""
    rss_mib: float


class Engine:
    """A `vllm.LLM` stepped by hand."""

    def __init__(self, model: Path, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        defaults = {
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "seed": 0,
        }
        self.llm = LLM(str(model), **(defaults | arguments))
        self.engine = self.llm.llm_engine
        self.open: list[str] = []
        self.requests = 0

    def fill(self, prompts: list[list[int]]) -> None:
        """End all streams, then open one a prompt and compute the prompts."""
        self.engine.abort_request(self.open)
        self.open = [self._add(prompt) for prompt in prompts]
        waiting = set(self.open)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step()}

    def time_steps(self, count: int) -> list[float]:
        """Seconds of each of the next `count` steps, one token for every open stream."""
        clock = [time.perf_counter()]
        for _ in range(count):
            self.engine.step()
            clock.append(time.perf_counter())
        return [stop - start for start, stop in pairwise(clock)]

    def time_prompt(self, prompt: list[int]) -> float:
        """Seconds until the first token of a single stream, which then ends."""
        start = time.perf_counter()
        self.fill([prompt])
        seconds = time.perf_counter() - start
        self.fill([])
        return seconds

    def nll(self, tokens: list[int], chunk: int, title: str) -> list[float]:
        """-log p of each token but the first, in nats; `chunk` tokens a step, for the progress."""
        request = self._add(tokens, max_tokens=1, prompt_logprobs=0)
        outputs: list[Any] = []
        with Progress() as progress:
            task = progress.add_task(title, total=len(tokens))
            while not outputs:
                outputs = self.engine.step()
                progress.advance(task, chunk)
        (output,) = outputs
        assert output.request_id == request
        scored = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        return [-candidates[token].logprob for token, candidates in scored]

    def memory(self) -> Memory:
        """Needs `disable_log_stats=False`."""
        metrics = {metric.name: metric for metric in self.llm.get_metrics()}
        # The usage leaves out the null block (vllm/v1/core/block_pool.py, get_usage).
        blocks = int(metrics["vllm:cache_config_info"].labels["num_gpu_blocks"]) - 1
        used = metrics["vllm:kv_cache_usage_perc"].value * blocks
        return Memory(round(used), round(psutil.Process().memory_info().rss / 2**20, 1))

    def _add(self, prompt: list[int], **parameters: Any) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        defaults = {
            "max_tokens": None,
            "ignore_eos": True,
            "temperature": 0.0,
            "detokenize": False,
            "output_kind": RequestOutputKind.DELTA,
        }
        self.requests += 1
        self.engine.add_request(
            str(self.requests),
            {"prompt_token_ids": prompt},
            SamplingParams(**(defaults | parameters)),
        )
        return str(self.requests)


class Worker:
    """An `Engine` elsewhere: `worker.run(Engine.time_steps, 16)`.

    Raises concurrent.futures.process.BrokenProcessPool where the engine does not start or dies;
    its own words are on stderr by then.
    """

    def __init__(self, model: Path, **arguments: Any) -> None:
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), _start, (model, arguments))

    def run(
        self,
        method: Callable[Concatenate[Engine, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        call: Callable[[], T] = partial(_run, method, *args, **kwargs)
        return self.pool.submit(call).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()


_engine: Engine


def _start(model: Path, arguments: dict[str, Any]) -> None:
    global _engine
    os.environ.update(ENVIRONMENT)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    _engine = Engine(model, arguments)


def _run(method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return method(_engine, *args, **kwargs)

"""Real vLLM engines, each in a process of its own.

Where arms are timed against each other, their engines share one core and take turns, never running
at the same time, so that whatever else the machine does meets both alike.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import psutil
from rich.progress import Progress, track

from benchmarks.harness.cli import BenchmarkError

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
GPU_SHARE = 0.4
"""Of a GPU's memory: two engines at a time."""


@dataclass(frozen=True)
class State:
    kv_blocks: int
    """Blocks that are not free, of all streams."""
    preemptions: int
    """Since the engine started."""
    rss_mib: float


class Engine:
    """A `vllm.LLM` stepped by hand."""

    def __init__(self, model: str | Path, arguments: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        defaults: dict[str, Any] = {
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "seed": 0,
        }
        if current_platform.is_cuda():
            defaults["gpu_memory_utilization"] = GPU_SHARE
            sink = arguments.get("additional_config", {}).get("sink")
            if sink and sink.get("policy") != "full":
                defaults["attention_backend"] = "CUSTOM"
        self.llm = LLM(str(model), **(defaults | arguments))
        self.engine = self.llm.llm_engine
        self.open: list[str] = []
        self.requests = 0

    def fill(self, prompts: list[list[int]]) -> None:
        """End all streams, then open one a prompt and compute the prompts."""
        self.offer(prompts)
        waiting = set(self.open)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step()}

    def offer(self, prompts: list[list[int]]) -> None:
        """End all streams, then queue one a prompt."""
        self.engine.abort_request(self.open)
        self.open = [self._add(prompt) for prompt in prompts]

    def time_steps(self, count: int) -> list[float]:
        """Seconds of each of the next `count` steps, one token for every open stream."""
        clock = [time.perf_counter()]
        for _ in range(count):
            self.engine.step()
            clock.append(time.perf_counter())
        return [stop - start for start, stop in pairwise(clock)]

    def profile(self, count: int) -> dict[str, float]:
        """Milliseconds of a step in each torch operator itself, of the next `count` steps."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as seen:
            self.time_steps(count)
        return {
            event.key: event.self_cpu_time_total / 1000 / count for event in seen.key_averages()
        }

    def streaming(self, count: int) -> list[int]:
        """How many streams received a token in each of the next `count` steps."""
        return [len(self.engine.step()) for _ in range(count)]

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

    def last_nll(self, passages: list[list[int]], title: str) -> list[float]:
        """-log p of the last token of each passage, in nats."""
        nll = []
        for *prompt, target in track(passages, title):
            # With prompt_logprobs, vLLM would score every token of the prompt.
            self._add(prompt, max_tokens=1, logprobs=1, logprob_token_ids=[target])
            outputs: list[Any] = []
            while not outputs:
                outputs = self.engine.step()
            ((scores,),) = (output.outputs[0].logprobs for output in outputs)
            nll.append(-scores[target].logprob)
        return nll

    def state(self) -> State:
        """Needs `disable_log_stats=False`."""
        metrics = {metric.name: metric for metric in self.llm.get_metrics()}
        # The usage leaves out the null block (vllm/v1/core/block_pool.py, get_usage).
        blocks = int(metrics["vllm:cache_config_info"].labels["num_gpu_blocks"]) - 1
        used = metrics["vllm:kv_cache_usage_perc"].value * blocks
        return State(
            kv_blocks=round(used),
            preemptions=metrics["vllm:num_preemptions"].value,
            rss_mib=round(psutil.Process().memory_info().rss / 2**20, 1),
        )

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

    Raises BenchmarkError where the engine does not start or dies.
    """

    def __init__(self, model: str | Path, *, pinned: bool = False, **arguments: Any) -> None:
        """`pinned` to the core that all such workers share; `arguments` are those of vllm.LLM."""
        start = (model, arguments, pinned)
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), _start, start)

    def run(
        self,
        method: Callable[Concatenate[Engine, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        call: Callable[[], T] = partial(_run, method, *args, **kwargs)
        try:
            return self.pool.submit(call).result()
        except BrokenProcessPool as error:
            raise BenchmarkError("The engine's process ended; its own words are above.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()


def pin() -> None:
    """Confine this process to one core, the same for all that call this."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def end_with_parent() -> None:
    """However the parent ends: otherwise a call under way would first be computed to its end."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


_engine: Engine


def _start(model: str | Path, arguments: dict[str, Any], pinned: bool) -> None:
    global _engine
    end_with_parent()
    # In time: no benchmark imports torch with itself, which reads OMP_NUM_THREADS only then.
    os.environ.update(ENVIRONMENT)
    if pinned:
        pin()
    _engine = Engine(model, arguments)


def _run(method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return method(_engine, *args, **kwargs)

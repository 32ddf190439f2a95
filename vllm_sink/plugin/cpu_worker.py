"""The worker of a CPU, for requests with a seed and a prompt of several chunks.

vLLM's V1 runner samples after every chunk of a prompt, and takes back what that drew from a
request's generator by the generator's offset (`_bookkeeping_sync`,
vllm/v1/worker/gpu_model_runner.py). Generators of a CPU have none, and the whole engine ends. Where
vLLM takes its V2 runner, which draws by position, this is not needed.
"""

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sink.plugin.worker import SinkWorker


class RewindableGenerator(torch.Generator):
    """A CPU generator whose offset counts draws back from the last `mark`."""

    @classmethod
    def of(cls, generator: torch.Generator) -> "RewindableGenerator":
        """In the state of `generator`."""
        rewindable = cls()
        rewindable.set_state(generator.get_state())
        return rewindable

    def mark(self) -> None:
        self.marked = self.get_state()

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        """Back to the mark, whatever the offset: one token is sampled between two marks."""
        self.set_state(self.marked)


class CPUSinkWorker(SinkWorker, CPUWorker):
    def sample_tokens(self, grammar_output: Any) -> Any:
        if not self.use_v2_model_runner:
            self._mark_generators()
        return super().sample_tokens(grammar_output)

    def _mark_generators(self) -> None:
        batch, requests = self.model_runner.input_batch, self.model_runner.requests
        for index, generator in batch.generators.items():
            if not isinstance(generator, RewindableGenerator):
                generator = RewindableGenerator.of(generator)
                batch.generators[index] = requests[batch.req_ids[index]].generator = generator
            generator.mark()

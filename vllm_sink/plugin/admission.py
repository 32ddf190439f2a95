"""A stream is admitted if all that it may come to hold fits beside what the others may.

vLLM admits by what a request holds at its beginning; streams grow, and the pool would be given out
twice. Here the bounds of those that run never exceed the pool, so that none preempts another. What
does not fit waits, and everything behind it, in order.
"""

from itertools import chain
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_sink.geometry import cdiv
from vllm_sink.plugin.config import buffer_of
from vllm_sink.plugin.manager import SinkManager

# Below "vllm", whose handlers and level vLLM sets up.
logger = init_logger(f"vllm.{__name__}")


class Admitting(Scheduler):
    """Goes before one of vLLM's schedulers, synchronous or asynchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.buffer = buffer_of(self.vllm_config)
        """Of every stream, if they are compacted."""
        self.managers = self.kv_cache_manager.coordinator.single_type_managers
        self.pool_blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # vLLM's null block
        self.reading_tokens = self.vllm_config.max_in_flight_tokens
        self.decoding_tokens = self.vllm_config.max_concurrent_batches
        self._log_summary()

    @property
    def max_num_active_reqs(self) -> int:
        """`schedule` asks each time before it looks at the next that waits: it has to fit."""
        return self._max_num_active_reqs if self._next_fits() else 0

    @max_num_active_reqs.setter
    def max_num_active_reqs(self, value: int) -> None:
        self._max_num_active_reqs = value

    def _next_fits(self) -> bool:
        queue = self.kv_holding_waiting or self.waiting
        if not queue or not self.running:
            return True
        holders = chain(self.running, self.kv_holding_waiting, [queue.peek_request()])
        return sum(self._most_blocks(request) for request in set(holders)) <= self.pool_blocks

    def _most_blocks(self, request: Request) -> int:
        """What a request may come to hold, in blocks of the pool."""
        longest = self._longest_buffer(request)
        unread = request.num_tokens - request.num_computed_tokens + request.num_in_flight_tokens
        total = 0
        for manager in self.managers:
            blocks = most_blocks(manager, longest, self.decoding_tokens)
            if unread > 1:
                read = most_blocks(manager, request.num_tokens, self.reading_tokens)
                blocks = max(blocks, read)
            total += blocks
        return total

    def _longest_buffer(self, request: Request) -> int:
        end: int = request.num_prompt_tokens + request.max_tokens
        if self.buffer is None:
            return min(end, self.max_model_len)
        return self.buffer.longest(request.num_prompt_tokens, end)

    def _log_summary(self) -> None:
        (sinks, *_) = (m for m in self.managers if isinstance(m, SinkManager))
        longest = self.buffer.mark if self.buffer else self.max_model_len
        held, read = (
            sum(most_blocks(manager, tokens, in_flight) for manager in self.managers)
            for tokens, in_flight in (
                (longest, self.decoding_tokens),
                (self.max_model_len, self.reading_tokens),
            )
        )
        logger.info(
            "Sinks S=%d, window W=%d tokens, blocks of %d: a stream holds at most %d blocks "
            "(%d while a full batch of its prompt is computed); KV pool of %d blocks: "
            "%d full streams fit; %s.",
            sinks.geometry.sinks,
            sinks.geometry.window,
            sinks.block_size,
            held,
            read,
            self.pool_blocks,
            self.pool_blocks // held,
            f"compacted every {self.buffer.mark - self.buffer.kept} tokens"
            if self.buffer
            else f"they end at {self.max_model_len} tokens",
        )


def most_blocks(manager: SingleTypeKVCacheManager, tokens: int, in_flight_tokens: int) -> int:
    """The most blocks that a buffer of so many tokens takes, of one group of layers."""
    spec = manager.kv_cache_spec
    if hasattr(spec, "max_admission_blocks_per_request"):
        # What has a window, by its own bound (vllm/v1/kv_cache_interface.py).
        bound: int = spec.max_admission_blocks_per_request(in_flight_tokens, tokens)
        return bound
    return cdiv(tokens, manager.block_size)

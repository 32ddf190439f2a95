"""What a scheduler tells of its streams, step by step, to `metrics.py` in a front end.

vLLM sends `SchedulerStats` from one process to the other and has no field for a plugin there. Its
`running_lora_adapters` holds counts by name, is empty until it arrives, and is not logged.
"""

from bisect import bisect_left
from collections import Counter
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_sink.plugin.manager import SinkManager

PREFIX = "sink:"
STATES = ("decoding", "reading", "waiting", "preempted")
HELD, EVICTED, COMPACTIONS, READ_ANEW = "held", "evicted", "compactions", "read_anew"
POSITIONS = tuple(mantissa * 10**power for power in range(2, 9) for mantissa in (1, 3))
"""Upper bounds of the histogram of positions, in tokens; the last bucket has none."""


class Counting(Scheduler):
    """Goes before one of vLLM's schedulers, synchronous or asynchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forgotten: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        """Tokens of a stream that its buffer does not hold any more; none before a compaction."""
        self.since_told: Counter[str] = Counter()

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            told = self._states() | self._positions() | self._blocks() | self.since_told
            self.since_told.clear()
            stats.running_lora_adapters |= {PREFIX + name: n for name, n in told.items()}
        return stats

    def _states(self) -> dict[str, int]:
        reading = sum(request.is_prefill_chunk for request in self.running)
        preempted = sum(request.status is RequestStatus.PREEMPTED for request in self.waiting)
        _, waiting = self.get_request_counts()
        counts = (len(self.running) - reading, reading, waiting - preempted, preempted)
        return dict(zip(STATES, counts, strict=True))

    def _positions(self) -> dict[str, int]:
        """How many running streams are no farther than each bound."""
        counts = [0] * (len(POSITIONS) + 1)
        for request in self.running:
            position = self.forgotten.get(request, 0) + request.num_tokens
            counts[bisect_left(POSITIONS, position)] += 1
        bounds = [*map(str, POSITIONS), "+Inf"]
        return dict(zip(bounds, accumulate(counts), strict=True))

    def _blocks(self) -> dict[str, int]:
        pool = self.kv_cache_manager.block_pool
        evicted = 0
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, SinkManager):
                evicted += manager.blocks_evicted
                manager.blocks_evicted = 0
        return {HELD: pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), EVICTED: evicted}

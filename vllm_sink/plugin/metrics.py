"""Seam: entry point group `vllm.stat_logger_plugins`, for vLLM's Prometheus endpoint."""

from collections.abc import Iterable
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.metrics import MetricWrapperBase
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vllm_sink.plugin.config import settings_of
from vllm_sink.plugin.statistics import (
    COMPACTIONS,
    EVICTED,
    HELD,
    POSITIONS,
    PREFIX,
    READ_ANEW,
    STATES,
)

NAMES = "vllm_sink:"
LABELS = ("model_name", "engine")
"""As vLLM's own metrics have them."""


class SinkStatLogger(AggregateStatLoggerBase):
    """Streams, blocks and compactions, of every engine that this process is a front end of."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.model_name = vllm_config.model_config.served_model_name
        settings = settings_of(vllm_config)
        self.tells = settings is not None and settings.evicts
        unregister()
        if self.tells:
            self._make_metrics()

    def _make_metrics(self) -> None:
        self.streams = gauge("streams", "Requests by what is being done with them.", "state")
        self.held = gauge("kv_blocks_held", "Blocks of the KV pool that requests hold.")
        self.positions = gauge(
            "stream_position_bucket", "Running streams that are no farther than `le` tokens.", "le"
        )
        self.counters = {
            EVICTED: counter("kv_blocks_evicted", "Blocks freed as their tokens left a window."),
            COMPACTIONS: counter("compactions", "Compactions of streams at the mark."),
            READ_ANEW: counter("compaction_tokens", "Tokens to be read anew after compactions."),
        }

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Takes out of the stats what is for it alone: vLLM's own loggers come after it."""
        if scheduler_stats is None or not self.tells:
            return
        counts = scheduler_stats.running_lora_adapters
        ours = [name for name in counts if name.startswith(PREFIX)]
        told = {name.removeprefix(PREFIX): counts.pop(name) for name in ours}
        if not told:
            return
        labels = (self.model_name, str(engine_idx))
        for state in STATES:
            self.streams.labels(*labels, state).set(told[state])
        for bound in (*map(str, POSITIONS), "+Inf"):
            self.positions.labels(*labels, bound).set(told[bound])
        self.held.labels(*labels).set(told[HELD])
        for name, metric in self.counters.items():
            metric.labels(*labels).inc(told.get(name, 0))

    def log_engine_initialized(self) -> None:
        pass


def gauge(name: str, documentation: str, *labels: str) -> Gauge:
    names = (*LABELS, *labels)
    return Gauge(NAMES + name, documentation, names, multiprocess_mode="mostrecent")


def counter(name: str, documentation: str) -> Counter:
    return Counter(NAMES + name, documentation, LABELS)


def unregister() -> None:
    """Forget the metrics of an engine that this process was a front end of before, as vLLM does."""
    collectors: Iterable[Any] = list(REGISTRY._collector_to_names)
    for collector in collectors:
        if isinstance(collector, MetricWrapperBase) and collector._name.startswith(NAMES):
            REGISTRY.unregister(collector)

"""This project's metrics among those that Ray exports, where vLLM's own are (ray/util/metrics)."""

import asyncio
import re
from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.samples import Sample
from ray.util.metrics import Gauge

from vllm_sink.plugin.metrics import NAMES

SECONDS = 5


def exported() -> asyncio.Task[None]:
    """A task that goes on for ever; it is to be held."""
    return asyncio.get_running_loop().create_task(export())


async def export() -> None:
    gauges: dict[str, Gauge] = {}
    while True:
        for sample in samples():
            name = re.sub(r"\W", "_", sample.name)
            if name not in gauges:
                gauges[name] = Gauge(name, sample.name, tuple(sample.labels))
            gauges[name].set(sample.value, dict(sample.labels))
        await asyncio.sleep(SECONDS)


def samples() -> Iterator[Sample]:
    """Counters as they stand, and the buckets of histograms: for Prometheus, all are numbers."""
    for metric in REGISTRY.collect():
        if metric.name.startswith(NAMES):
            yield from metric.samples

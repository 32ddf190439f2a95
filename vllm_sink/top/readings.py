"""What the `/metrics` of a server tells, and what changed between two readings of it."""

import time
from dataclasses import dataclass
from functools import cached_property

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

CONFIG = "vllm:cache_config_info"
"""Every server of vLLM's has it, from its start."""
PATH = "/metrics"


class NoMetricsError(Exception):
    """One sentence: there is no answer, or one without vLLM's metrics."""


@dataclass(frozen=True)
class Reading:
    """One moment's metrics, of all engines of the server together."""

    families: tuple[Metric, ...]
    at: float
    """Seconds of a monotonic clock."""

    @classmethod
    def parse(cls, text: str, at: float) -> "Reading":
        """Raises `ValueError` on what is no text of Prometheus metrics, or has none of vLLM's."""
        reading = cls(tuple(text_string_to_metric_families(text)), at)
        if not reading.samples(CONFIG):
            raise ValueError
        return reading

    def has(self, prefix: str) -> bool:
        """Whether there are metrics named so, though none may have been counted yet."""
        return any(family.name.startswith(prefix) for family in self.families)

    def samples(self, name: str) -> list[Sample]:
        return [
            sample for family in self.families for sample in family.samples if sample.name == name
        ]

    def total(self, name: str) -> float:
        return sum(sample.value for sample in self.samples(name))

    def by(self, label: str, name: str) -> dict[str, float]:
        """Totals of a metric by the values of a label, in the order of the text."""
        totals: dict[str, float] = {}
        for sample in self.samples(name):
            value = sample.labels[label]
            totals[value] = totals.get(value, 0) + sample.value
        return totals

    @cached_property
    def engines(self) -> list[str]:
        """Told from the start, as gauges are not where there are several API servers."""
        return [sample.labels["engine"] for sample in self.samples(CONFIG)]

    @cached_property
    def models(self) -> set[str]:
        samples = (sample for family in self.families for sample in family.samples)
        return {sample.labels["model_name"] for sample in samples if "model_name" in sample.labels}

    @cached_property
    def counters(self) -> dict[str, float]:
        names = {
            sample.name
            for family in self.families
            if family.type == "counter"
            for sample in family.samples
        }
        return {name: self.total(name) for name in names}


NOTHING = Reading((), 0.0)
"""As before a server's start."""


@dataclass(frozen=True)
class Interval:
    """From one reading to the next; from a first reading to itself, where nothing is known."""

    before: Reading
    now: Reading

    @cached_property
    def restarted(self) -> bool:
        """Whether the server counts anew."""
        now = self.now.counters
        return any(now.get(name, 0) < total for name, total in self.before.counters.items())

    def increase(self, name: str) -> float:
        """Of a counter: after a restart, what was counted since."""
        return self.now.total(name) - (0 if self.restarted else self.before.total(name))

    def rate(self, name: str) -> float | None:
        """A second; None where no time has passed."""
        seconds = self.now.at - self.before.at
        return self.increase(name) / seconds if seconds else None

    def ratio(self, part: str, whole: str) -> float | None:
        """Of two counters' increases; None where nothing was counted."""
        counted = self.increase(whole)
        return self.increase(part) / counted if counted else None


def base(url: str) -> str:
    """What a server's paths come after, from what a user may call its URL."""
    url = url if "://" in url else f"http://{url}"
    url = url.rstrip("/")
    return url.removesuffix(PATH).removesuffix("/v1").rstrip("/")


def read(client: httpx.Client, url: str) -> Reading:
    """Raises `NoMetricsError`."""
    try:
        answer = client.get(url + PATH)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NoMetricsError(f"no answer from {url}: {error}") from error
    try:
        return Reading.parse(answer.text, time.monotonic())
    except ValueError as error:
        raise NoMetricsError(
            f"no metrics of vLLM at {url + PATH}: status {answer.status_code}"
        ) from error

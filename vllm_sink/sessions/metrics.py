"""Metrics of sessions, beside vLLM's own in its Prometheus endpoint."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Histogram

from vllm_sink.sessions.errors import ConflictError, SessionError

NAMES = "vllm_sink:session_"
LABELS = ("model_name",)
COMMIT_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)


class SessionMetrics:
    """Of the sessions that one process serves."""

    def __init__(self, model_name: str) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            made = Counter(NAMES + name, documentation, (*LABELS, *labels))
            return made if labels else made.labels(model_name)

        self.model_name = model_name
        self.turns = counter("turns", "Turns that were committed.")
        self.hits = counter("hits", "Later turns that found tokens in the prefix cache.")
        self.misses = counter("misses", "Later turns whose buffer was read anew.")
        self.conflicts = counter("conflicts", "Turns and requests refused with status 409.")
        self.refusals = counter("refusals", "Turns and requests refused, by status.", "status")
        errors: list[type[SessionError]] = [SessionError, *SessionError.__subclasses__()]
        for error in errors:  # so that rates include the first one of each status
            self.refusals.labels(model_name, str(int(error.status)))
        commits = Histogram(
            NAMES + "commit_seconds", "Time to store a turn.", LABELS, buckets=COMMIT_SECONDS
        )
        self.commits = commits.labels(model_name)

    def turn(self, cached_tokens: int, is_first: bool) -> None:
        self.turns.inc()
        if not is_first:
            (self.hits if cached_tokens else self.misses).inc()

    @contextmanager
    def committing(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.commits.observe(time.monotonic() - start)

    def refused(self, error: SessionError) -> None:
        if isinstance(error, ConflictError):
            self.conflicts.inc()
        self.refusals.labels(self.model_name, str(int(error.status))).inc()

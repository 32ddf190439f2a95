"""Many clients at once: what they send, made beforehand from real text, and what they saw.

NVIDIA's aiperf sends it, each client's requests one after the other, times every streamed token and
samples the server's Prometheus metrics meanwhile.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import venvs
from benchmarks.harness.cli import BenchmarkError
from benchmarks.harness.servers import cause
from launch import group
from vllm_sink import embedded

LONGEST_STREAM = 100_000
"""In tokens: what a book of 145,736 has for every client."""
PERCENTILES = ("p50", "p95", "p99")
INPUTS = "inputs.json"
SETTINGS = {
    "custom-dataset-type": "inputs-json",
    "endpoint-type": "completions",
    "workers-max": 1,
    "record-processors": 1,
    "server-metrics-formats": "json",
    "ui": "none",
}
SAMPLE_SECONDS = 2
"""Of a server's metrics: while it writes them it streams nothing."""
SWITCHES = ("--streaming", "--use-server-token-count", "--no-gpu-telemetry")


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    output_tokens: int

    def payload(self, model: str) -> dict[str, Any]:
        """Of /v1/completions. As text: a server's vocabulary need not be the benchmark's."""
        return {
            "model": model,
            "prompt": text(self.prompt),
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True)
class Workload:
    """A client is one long stream: a prompt, then what is generated."""

    prompt_tokens: int
    output_tokens: int
    resent_every: int
    """Tokens that a client which truncates its context is sent at a time."""

    @property
    def stream_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def requests(self, passage: list[int], kept_tokens: int | None) -> list[Request]:
        """One request, or one after the other from a client that sends its last `kept_tokens` anew.

        The passage stands in for what such a client was sent, which nobody knows beforehand: the
        work is the same.
        """
        if kept_tokens is None:
            return [Request(passage[: self.prompt_tokens], self.output_tokens)]
        ends = range(self.prompt_tokens, self.stream_tokens, self.resent_every)
        return [
            Request(
                passage[max(0, end - kept_tokens) : end],
                min(self.resent_every, self.stream_tokens - end),
            )
            for end in ends
        ]


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded.path())


def text(tokens: list[int]) -> str:
    decoded: str = _tokenizer().decode(tokens)
    return decoded


def run(url: str, model: str, clients: list[list[Request]]) -> dict[str, Any]:
    """Let all clients send their requests to the server at `url`, and return what they saw.

    Raises:
        BenchmarkError: the generator failed, which is not to say that a request did.
    """
    sessions = [
        {"session_id": str(i), "payloads": [request.payload(model) for request in requests]}
        for i, requests in enumerate(clients)
    ]
    settings = {
        **SETTINGS,
        # Loaded even though the server counts the tokens.
        "tokenizer": embedded.path(),
        "url": url,
        "model": model,
        "concurrency": len(clients),
        "request-count": sum(map(len, clients)),
    }
    with TemporaryDirectory(prefix="vllm-sink-") as scratch:
        folder = Path(scratch)
        inputs = folder / INPUTS
        inputs.write_text(json.dumps({"data": sessions}), encoding="utf-8")
        paths = {"input-file": inputs, "artifact-dir": folder}
        flags = [f"--{name}={value}" for name, value in {**settings, **paths}.items()]
        # Told to be offline, it takes a tokenizer from the hub's cache alone.
        variables = ["-u", "HF_HUB_OFFLINE", "-u", "TRANSFORMERS_OFFLINE"]
        variables.append(f"AIPERF_SERVER_METRICS_COLLECTION_INTERVAL={SAMPLE_SECONDS}")
        command = [str(venvs.python("load")), "-m", "aiperf", "profile", *flags, *SWITCHES]
        with group.running(["env", *variables, *command]) as generator:
            generator.leader.wait()
            if not (folder / "profile_export.jsonl").exists():
                log = generator.log.read_text(encoding="utf-8", errors="replace")
                raise BenchmarkError(f"aiperf sent nothing: {cause(log)}")
        return figures(folder)


def figures(folder: Path) -> dict[str, Any]:
    """From what aiperf wrote; None for what no request or no server told."""
    errors = list(_errors(folder / "profile_export.jsonl"))
    summary = _json(folder / "profile_export_aiperf.json")
    server = _json(folder / "server_metrics_export.json").get("metrics", {})
    preemptions = _statistics(server, "vllm:num_preemptions", "total")
    usage = _statistics(server, "vllm:kv_cache_usage_perc", "max")
    return {
        "output_tokens_s": _figure(summary, "output_token_throughput", "avg"),
        "ttft_ms": {p: _figure(summary, "time_to_first_token", p) for p in PERCENTILES},
        # A stream's mean, since tokens may arrive several at once; the percentiles are of streams.
        "inter_token_ms": {p: _figure(summary, "inter_token_latency", p) for p in PERCENTILES},
        "seconds": _figure(summary, "benchmark_duration", "avg"),
        "requests_finished": int(_figure(summary, "request_count", "avg") or 0),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "preemptions": int(sum(preemptions)) if preemptions else None,
        "kv_usage_peak": round(max(usage), 4) if usage else None,
    }


def _errors(records: Path) -> Iterator[str]:
    for line in records.read_text(encoding="utf-8").splitlines():
        error = json.loads(line).get("error")
        if error:
            yield error["message"]


def _json(path: Path) -> dict[str, Any]:
    """Empty where aiperf had nothing to write: no request finished, or no metrics were found."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _figure(summary: dict[str, Any], name: str, statistic: str) -> float | None:
    return round(summary[name][statistic], 2) if name in summary else None


def _statistics(server: dict[str, Any], name: str, statistic: str) -> list[float]:
    """Of each of the server's engines; none where it has no such metric."""
    return [series["stats"][statistic] for series in server.get(name, {"series": []})["series"]]

import json
from pathlib import Path

import pytest

from benchmarks.harness import load
from benchmarks.harness.load import Request, Workload, figures

WORKLOAD = Workload(prompt_tokens=4, output_tokens=5, resent_every=2)


def test_a_stream_is_one_request() -> None:
    assert WORKLOAD.requests([*range(9)], kept_tokens=None) == [Request([0, 1, 2, 3], 5)]


def test_a_client_that_truncates_sends_what_it_kept_until_its_stream_is_as_long() -> None:
    assert WORKLOAD.requests([*range(9)], kept_tokens=5) == [
        Request([0, 1, 2, 3], 2),
        Request([1, 2, 3, 4, 5], 2),
        Request([3, 4, 5, 6, 7], 1),
    ]


def test_a_prompt_is_sent_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "text", str)
    payload = Request([1, 2], 3).payload("model")
    assert payload["prompt"] == "[1, 2]"
    assert payload["max_tokens"] == 3
    assert payload["ignore_eos"]


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def test_figures_are_read_from_what_aiperf_wrote(tmp_path: Path) -> None:
    waits = {"p50": 1.234, "p95": 2.0, "p99": 3.0}
    summary = {
        "output_token_throughput": {"unit": "tokens/sec", "avg": 51.69933},
        "time_to_first_token": waits,
        "inter_token_latency": waits,
        "benchmark_duration": {"avg": 15.4638},
        "request_count": {"avg": 2.0},
    }
    metrics = {
        "vllm:num_preemptions": {"series": [{"stats": {"total": 3.0}}]},
        "vllm:kv_cache_usage_perc": {"series": [{"stats": {"avg": 0.1, "max": 0.16667}}]},
    }
    write(tmp_path, "profile_export.jsonl", {"metrics": {}})
    write(tmp_path, "profile_export_aiperf.json", summary)
    write(tmp_path, "server_metrics_export.json", {"metrics": metrics})
    rounded = {"p50": 1.23, "p95": 2.0, "p99": 3.0}
    assert figures(tmp_path) == {
        "output_tokens_s": 51.7,
        "ttft_ms": rounded,
        "inter_token_ms": rounded,
        "seconds": 15.46,
        "requests_finished": 2,
        "errors": 0,
        "first_error": None,
        "preemptions": 3,
        "kv_usage_peak": 0.1667,
    }


def test_refusals_are_counted_where_nothing_else_was_seen(tmp_path: Path) -> None:
    refused = json.dumps({"metrics": {}, "error": {"code": 400, "message": "too long"}})
    (tmp_path / "profile_export.jsonl").write_text(f"{refused}\n{refused}\n")
    found = figures(tmp_path)
    assert (found["requests_finished"], found["errors"]) == (0, 2)
    assert found["first_error"] == "too long"
    assert found["output_tokens_s"] is None
    assert found["preemptions"] is None

"""What the view tells of two readings, and its command against a server of their texts.

`tests/server/test_metrics.py` has a real one.
"""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from launch.server import free_port
from vllm_sink.top.command import parse
from vllm_sink.top.readings import Interval, Reading, base
from vllm_sink.top.view import NO_SINKS, view

# As servers with vLLM 0.32 printed them; what nobody reads is left out, and most buckets.
EARLIER = """\
# TYPE vllm_sink:kv_blocks_evicted_total counter
vllm_sink:kv_blocks_evicted_total{engine="0",model_name="tiny"} 212.0
# TYPE vllm_sink:compactions_total counter
vllm_sink:compactions_total{engine="0",model_name="tiny"} 63.0
# TYPE vllm_sink:compaction_tokens_total counter
vllm_sink:compaction_tokens_total{engine="0",model_name="tiny"} 4032.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 4959.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 96.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 927.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="tiny"} 10360.0
vllm:cache_config_info{engine="0",num_gpu_blocks="8192"} 1.0
# TYPE vllm_sink:session_turns_total counter
vllm_sink:session_turns_total{model_name="tiny"} 10.0
# TYPE vllm_sink:session_hits_total counter
vllm_sink:session_hits_total{model_name="tiny"} 3.0
# TYPE vllm_sink:session_misses_total counter
vllm_sink:session_misses_total{model_name="tiny"} 3.0
# TYPE vllm_sink:session_conflicts_total counter
vllm_sink:session_conflicts_total{model_name="tiny"} 1.0
# TYPE vllm_sink:session_refusals_total counter
vllm_sink:session_refusals_total{model_name="tiny",status="409"} 1.0
vllm_sink:session_refusals_total{model_name="tiny",status="404"} 1.0
# TYPE vllm_sink:session_commit_seconds histogram
vllm_sink:session_commit_seconds_count{model_name="tiny"} 10.0
vllm_sink:session_commit_seconds_sum{model_name="tiny"} 0.12879908600007184
"""
NOW = """\
vllm_sink:streams{engine="0",model_name="tiny",state="decoding"} 2.0
vllm_sink:streams{engine="0",model_name="tiny",state="reading"} 0.0
vllm_sink:streams{engine="0",model_name="tiny",state="waiting"} 0.0
vllm_sink:streams{engine="0",model_name="tiny",state="preempted"} 0.0
vllm_sink:kv_blocks_held{engine="0",model_name="tiny"} 6.0
vllm_sink:stream_position_bucket{engine="0",le="100",model_name="tiny"} 0.0
vllm_sink:stream_position_bucket{engine="0",le="300",model_name="tiny"} 0.0
vllm_sink:stream_position_bucket{engine="0",le="1000",model_name="tiny"} 0.0
vllm_sink:stream_position_bucket{engine="0",le="3000",model_name="tiny"} 2.0
vllm_sink:stream_position_bucket{engine="0",le="+Inf",model_name="tiny"} 2.0
# TYPE vllm_sink:kv_blocks_evicted_total counter
vllm_sink:kv_blocks_evicted_total{engine="0",model_name="tiny"} 231.0
# TYPE vllm_sink:compactions_total counter
vllm_sink:compactions_total{engine="0",model_name="tiny"} 69.0
# TYPE vllm_sink:compaction_tokens_total counter
vllm_sink:compaction_tokens_total{engine="0",model_name="tiny"} 4416.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 5411.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 160.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 995.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="tiny"} 11178.0
vllm:cache_config_info{engine="0",num_gpu_blocks="8192"} 1.0
# TYPE vllm_sink:session_turns_total counter
vllm_sink:session_turns_total{model_name="tiny"} 11.0
# TYPE vllm_sink:session_hits_total counter
vllm_sink:session_hits_total{model_name="tiny"} 4.0
# TYPE vllm_sink:session_misses_total counter
vllm_sink:session_misses_total{model_name="tiny"} 3.0
# TYPE vllm_sink:session_conflicts_total counter
vllm_sink:session_conflicts_total{model_name="tiny"} 1.0
# TYPE vllm_sink:session_refusals_total counter
vllm_sink:session_refusals_total{model_name="tiny",status="409"} 1.0
vllm_sink:session_refusals_total{model_name="tiny",status="404"} 2.0
# TYPE vllm_sink:session_commit_seconds histogram
vllm_sink:session_commit_seconds_count{model_name="tiny"} 11.0
vllm_sink:session_commit_seconds_sum{model_name="tiny"} 0.13429606500176305
"""
TWO_ENGINES = """\
vllm:cache_config_info{engine="0",num_gpu_blocks="16384"} 1.0
vllm:cache_config_info{engine="1",num_gpu_blocks="16384"} 1.0
vllm_sink:streams{engine="0",model_name="tiny",state="decoding"} 2.0
vllm_sink:streams{engine="0",model_name="tiny",state="reading"} 0.0
vllm_sink:streams{engine="0",model_name="tiny",state="waiting"} 0.0
vllm_sink:streams{engine="0",model_name="tiny",state="preempted"} 0.0
vllm_sink:streams{engine="1",model_name="tiny",state="decoding"} 0.0
vllm_sink:streams{engine="1",model_name="tiny",state="reading"} 0.0
vllm_sink:streams{engine="1",model_name="tiny",state="waiting"} 0.0
vllm_sink:streams{engine="1",model_name="tiny",state="preempted"} 0.0
vllm_sink:stream_position_bucket{engine="0",le="300",model_name="tiny"} 0.0
vllm_sink:stream_position_bucket{engine="0",le="1000",model_name="tiny"} 1.0
vllm_sink:stream_position_bucket{engine="0",le="3000",model_name="tiny"} 2.0
vllm_sink:stream_position_bucket{engine="0",le="+Inf",model_name="tiny"} 2.0
vllm_sink:stream_position_bucket{engine="1",le="300",model_name="tiny"} 0.0
vllm_sink:stream_position_bucket{engine="1",le="1000",model_name="tiny"} 0.0
vllm_sink:stream_position_bucket{engine="1",le="3000",model_name="tiny"} 0.0
vllm_sink:stream_position_bucket{engine="1",le="+Inf",model_name="tiny"} 0.0
vllm_sink:kv_blocks_held{engine="0",model_name="tiny"} 8.0
vllm_sink:kv_blocks_held{engine="1",model_name="tiny"} 0.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="tiny"} 2964.0
vllm:generation_tokens_total{engine="1",model_name="tiny"} 2380.0
"""
TWO_ENGINES_AT_FIRST = """\
vllm:cache_config_info{engine="0",num_gpu_blocks="16384"} 1.0
vllm:cache_config_info{engine="1",num_gpu_blocks="16384"} 1.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="tiny"} 0.0
vllm:generation_tokens_total{engine="1",model_name="tiny"} 0.0
# TYPE vllm_sink:session_turns_total counter
vllm_sink:session_turns_total{model_name="tiny"} 0.0
"""
STOCK = """\
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="tiny"} 0.0
vllm:cache_config_info{engine="0",num_gpu_blocks="8192"} 1.0
"""

ROOT = Path(__file__).parents[1]
BOLD = "\x1b[1m"
"""And not dimmed: what is past is both."""
TOP = [sys.executable, "-m", "vllm_sink.top", "--interval=0.1"]


def shown(now: str, before: str | None = None, seconds: float = 2.0) -> str:
    """The view of a reading, so long after the other one; without one, of a first reading."""
    read = Reading.parse(now, at=100.0)
    earlier = read if before is None else Reading.parse(before, at=100.0 - seconds)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(view("http://127.0.0.1:8000", Interval(earlier, read)))
    return capture.get()


@pytest.mark.parametrize(
    "figures",
    [
        "model tiny  engines 1",
        "streams       decoding 2  reading 0  waiting 0  preempted 0",
        "compactions   3.0/s  tokens read anew 192.0/s",
        "evictions     blocks 9.5/s",
        "tokens        generated 409.0/s  of prompts 34.0/s",
        "KV blocks     held 6 of 8,191",
        "prefix cache  hit rate 14.2%  since the start 3.0%",
        "sessions      turns 11  0.5/s  hits 4  misses 3",
        "conflicts 1  refusals 3 (409: 1, 404: 2)",
        "mean commit 5.5 ms",
    ],
)
def test_figures_are_of_the_interval(figures: str) -> None:
    assert figures in shown(NOW, EARLIER)


def test_a_first_reading_has_no_rates() -> None:
    text = shown(NOW)
    assert "tokens        generated -  of prompts -" in text
    assert "hit rate -  since the start 3.0%" in text
    assert "mean commit -" in text
    assert "/s" not in text


def test_a_restarted_server_counts_from_zero() -> None:
    text = shown(EARLIER, before=NOW)
    assert "generated 5,180.0/s" in text
    assert "mean commit 12.9 ms" in text
    assert not re.search(r"-\d", text)


def test_positions_are_streams_of_their_own_bucket() -> None:
    several = NOW.replace('le="300",model_name="tiny"} 0.0', 'le="300",model_name="tiny"} 1.0')
    several = several.replace(
        'le="1000",model_name="tiny"} 0.0', 'le="1000",model_name="tiny"} 1.0'
    )
    rows = re.findall(r"(up to [0-9,]+|farther) +(\d+) *(━*)", shown(several))
    assert [row[:2] for row in rows] == [
        ("up to 300", "1"),
        ("up to 1,000", "0"),
        ("up to 3,000", "1"),
    ]
    assert [bool(bar) for *_, bar in rows] == [True, False, True]


def test_engines_add_up() -> None:
    """Each with all blocks of the pool in its label."""
    text = shown(TWO_ENGINES)
    assert "engines 2" in text
    assert "decoding 2" in text
    assert "held 8 of 16,382" in text
    assert "since the start" in text
    assert re.search(r"up to 1,000 +1 .*\n +up to 3,000 +1 ", text)
    assert Reading.parse(TWO_ENGINES, at=0.0).total("vllm:generation_tokens_total") == 2964 + 2380


def test_what_is_not_counted_yet_is_none() -> None:
    """Several API servers tell gauges from the first request on."""
    text = shown(TWO_ENGINES_AT_FIRST)
    assert "held 0 of 16,382" in text
    assert "turns 0" in text
    assert "streams" not in text


def test_a_stock_server_is_told_apart() -> None:
    text = shown(STOCK)
    assert NO_SINKS in text
    assert "held 0 of 8,191" in text
    assert "sessions " not in text
    assert NO_SINKS not in shown(NOW)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8000/",
        "127.0.0.1:8000/metrics",
        "http://127.0.0.1:8000/v1/",
    ],
)
def test_a_server_has_many_urls(url: str) -> None:
    assert base(url) == "http://127.0.0.1:8000"


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "x"])
def test_intervals_that_cannot_be_waited_for(interval: str) -> None:
    with pytest.raises(SystemExit):
        parse(["127.0.0.1", f"--interval={interval}"])


TEXTS = {"/metrics": NOW, "/html/metrics": "<html>no</html>", "/other/metrics": "up 1.0\n"}


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path in TEXTS else 404)
        self.end_headers()
        self.wfile.write(TEXTS.get(self.path, "{}").encode())

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def answering(port: int) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", port), Answers) as server:
        Thread(target=server.serve_forever).start()
        try:
            yield
        finally:
            server.shutdown()


def test_without_a_server_it_ends_with_one_sentence() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert_refused([*TOP, url], f"no answer from {url}: ")


@pytest.mark.parametrize(("path", "status"), [("/html", 200), ("/other", 200), ("/none", 404)])
def test_without_metrics_it_ends_with_one_sentence(path: str, status: int) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}{path}"
    with answering(port):
        assert_refused([*TOP, url], f"no metrics of vLLM at {url}/metrics: status {status}")


def test_missing_packages_are_named() -> None:
    command = [sys.executable, "-S", *TOP[1:], "127.0.0.1"]
    assert_refused(command, "it needs more packages: pip install httpx prometheus-client rich")


def assert_refused(command: list[str], sentence: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"python -m vllm_sink.top: error: {sentence}")
    assert done.stderr.count("\n") == 1


def test_a_terminal_shows_a_server_that_goes_away_and_comes_back() -> None:
    port = free_port()
    terminal, end = pty.openpty()
    command = [*TOP, f"127.0.0.1:{port}"]
    environment = os.environ | {"TERM": "xterm-256color"}
    with answering(port):
        top = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=end, stderr=end)
        os.close(end)
        read_until(terminal, "decoding 2")
    read_until(terminal, "no answer from")
    with answering(port):
        read_until(terminal, f"{BOLD}http://")
        top.send_signal(signal.SIGINT)
        assert b"Traceback" not in rest_of(terminal)
        assert top.wait(timeout=10) == 0
    os.close(terminal)


def read_until(terminal: int, text: str) -> None:
    seen = b""
    while text.encode() not in seen:
        seen += os.read(terminal, 2**16)


def rest_of(terminal: int) -> bytes:
    seen = b""
    with suppress(OSError):  # at its end, which a process closes
        while True:
            seen += os.read(terminal, 2**16)
    return seen

"""The demo's pure parts; the run as a whole against a real server is slow."""

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from launch.demo import CacheUse, Run, Stream, parse, passages, server_command
from vllm_sink.geometry import Geometry

# As vLLM 0.32 printed it while four streams ran; labels that nobody reads are left out.
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="smollm2-135m-instruct"} 4.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="smollm2-135m-instruct"} 0.05509641873278237
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="364",sliding_window="None"} 1.0
# HELP vllm_sink:compactions_total Compactions of streams at the mark.
# TYPE vllm_sink:compactions_total counter
vllm_sink:compactions_total{engine="0",model_name="smollm2-135m-instruct"} 8.0
"""

DEMO = [sys.executable, "-m", "launch.demo"]


def assert_ended(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def run_of(*positions: int) -> Run:
    streams = [Stream(f"{i}", []) for i, _ in enumerate(positions)]
    for stream, position in zip(streams, positions, strict=True):
        stream.advance(position, "")
    return Run(streams, Geometry(sinks=4, window=508), tokens=2112, max_model_len=1024)


def printed(run: Run) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(run.table())
    return capture.get()


def test_cache_use_is_read_from_prometheus_text() -> None:
    use = CacheUse.parse(METRICS)
    assert (use.block_size, use.streams, use.compactions) == (128, 4, 8)
    assert use.blocks == pytest.approx(20)
    assert use.blocks_a_stream == pytest.approx(5)


def test_no_stream_holds_no_blocks() -> None:
    assert CacheUse(block_size=128, blocks=0.0, streams=0, compactions=0).blocks_a_stream == 0


def test_the_most_blocks_held_are_kept() -> None:
    run = run_of(600, 700)
    for blocks in (8.0, 12.0, 10.0):
        run.see(CacheUse(block_size=128, blocks=blocks, streams=2, compactions=3))
    assert (run.blocks_a_stream, run.most_blocks_a_stream) == (5, 6)
    assert "6.0 at most; bound 6; without eviction 6" in run.blocks_line()
    assert "max_model_len 1,024, at which 3 times a stream was compacted" in run.blocks_line()


def test_prompts_still_being_read_are_not_counted() -> None:
    run = run_of(600, 0)
    run.see(CacheUse(block_size=128, blocks=40.0, streams=2, compactions=0))
    assert run.most_blocks_a_stream == 0
    assert run.blocks_line() == "reading prompts"


def test_a_run_is_done_when_every_stream_is() -> None:
    assert not run_of(2112, 2111).done
    assert run_of(2112, 2112).done


def test_speed_counts_from_the_first_token() -> None:
    stream = Stream("1", [], prompt_tokens=100)
    stream.advance(101, "one")
    stream.advance(111, " more")
    stream.first_token_at, stream.last_token_at = 50.0, 52.0
    assert (stream.generated, stream.text) == (11, "one more")
    assert stream.tokens_per_second == 5


def test_the_summary_has_a_row_a_stream() -> None:
    run = run_of(1016, 2112)
    run.streams[1].text = "a [bold] claim\nof it"
    table = printed(run)
    assert "1,016" in table
    assert "2.0" in table
    assert "4.2" in table
    assert "a [bold] claim of it" in table


def test_clients_read_different_passages() -> None:
    texts = passages(4)
    assert len(set(texts)) == 4
    assert all(len(text) > 1000 for text in texts)


def test_the_default_length_is_four_windows_and_more() -> None:
    assert parse([]).tokens == 4 * 512 + 64
    assert parse(["--window", "1020"]).tokens == 4 * 1024 + 64
    assert parse(["--tokens", "9000"]).tokens == 9000


def test_a_length_the_prompt_fills_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--tokens", "100"])
    assert "--tokens 100: at least 512" in capsys.readouterr().err


def test_the_server_is_told_what_was_asked_for() -> None:
    command = " ".join(server_command(Path("model"), parse(["--window", "252"]), 8123, Path("a.b")))
    assert "--sink-tokens 4 --window-tokens 252" in command
    assert "--port 8123" in command
    assert "--max-model-len 1024" in command
    assert "--session-store sqlite:a.b" in command


@pytest.mark.slow
def test_streams_pass_window_and_length_in_bounded_memory() -> None:
    command = [*DEMO, "--window", "252", "--tokens", "1100", "--clients", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    most, bound = re.findall(r"([0-9.]+) at most; bound (\d+)", finished.stdout)[-1]
    assert 0 < float(most) <= int(bound)
    assert finished.stdout.count("1,100") >= 2
    assert "max_model_len 1,024, at which 2 times" in finished.stdout
    before, after = finished.stdout.split("The server was killed.")
    for said in (before, after):
        assert re.search(r"model: .*4711", said)
    (position,) = re.findall(r"5 turns, ([\d,]+) tokens", after)
    assert int(position.replace(",", "")) > 3 * 256


@pytest.mark.slow
def test_a_signal_while_streaming_leaves_no_process_behind() -> None:
    demo = subprocess.Popen([*DEMO, "--clients", "2"], stdout=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    assert any("tokens generated" in line for line in demo.stdout)
    children = psutil.Process(demo.pid).children(recursive=True)
    demo.terminate()
    assert "Interrupted" in demo.communicate()[0]
    assert demo.returncode == 130
    assert children
    assert_ended(children)

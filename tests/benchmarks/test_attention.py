from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import attention, report
from benchmarks.harness import results
from benchmarks.harness.attention_arms import MODELS, Call, Kernel, Point, Shape, Step, step, verify
from benchmarks.harness.cli import BenchmarkError
from tests.attention.cases import H100_PROCESSORS, device_of, needs_triton
from vllm_sink.attention.reference import ReferenceAttention

POINTS = {
    "decode": Point("decode", "tiny", cache=64, length=137, streams=3),
    "chunk": Point("prefill", "tiny", cache=64, length=190, queries=53),
    "whole": Point("prefill", "tiny", cache=128, length=64, queries=64),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", Shape(heads=4, kv_heads=2, head_size=32))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["attention", "--quick"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchmarkError, match="torch finds no CUDA GPU"):
        attention.main()


def test_bytes_that_a_decode_step_moves() -> None:
    keys_and_values = 3 * 64 * 2 * 2 * 32
    queries_and_outputs = 3 * 4 * 2 * 32
    assert POINTS["decode"].bytes_at_least == 2 * (keys_and_values + queries_and_outputs)


def test_what_does_not_fit_is_skipped() -> None:
    point = Point("decode", "Llama-2-7B", cache=512, length=1033, streams=8)
    # 4 sinks in a block; S + W = 512 tokens up to the 1,033rd in blocks 32 to 64.
    cache_bytes = (1 + 8 * (1 + 33)) * 16 * 32 * 256 * 2
    enough = round(cache_bytes / attention.FREE_SHARE) + 1
    assert attention.skipped(point, enough) is None
    record = attention.skipped(point, enough // 2)
    assert record is not None
    assert record["skipped"] == "its cache takes 0.1 GiB, over 40% of the 0.1 that are free"


def test_freed_blocks_are_null_and_live_ones_are_nobody_elses() -> None:
    point = POINTS["decode"]
    table = step(point, "cpu").batch.block_table
    # 64 tokens up to the 137th begin in block 4; block 0 has the sinks.
    assert point.live_blocks == [0, 4, 5, 6, 7, 8]
    assert (table[:, 1:4] == 0).all()
    assert sorted(table[table > 0].tolist()) == list(range(1, point.storage_shape[0]))


def test_whole_streams_are_of_s_plus_w_tokens_that_lie_in_the_same_blocks() -> None:
    given = step(POINTS["decode"], "cpu")
    whole = given.whole(POINTS["decode"].live_blocks, 64)
    assert whole.batch.seq_lens.tolist() == [64, 64, 64]
    assert torch.equal(whole.batch.block_table, given.batch.block_table[:, [0, 4, 5, 6]])


@needs_triton
@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("processors", [1, H100_PROCESSORS])
def test_triton_passes_and_what_is_wrong_is_caught(name: str, processors: int) -> None:
    from vllm_sink.attention.triton import TritonAttention

    kernel = TritonAttention(processors)
    given = step(POINTS[name], device_of(kernel))
    for arm in (given, given.without_sinks(POINTS[name].cache)):
        out = torch.full_like(given.query, torch.nan)
        arm.call(kernel, out)()
        verify(name, arm, out)
    out[given.first(2).batch.query_start_loc[-1] - 1] *= 1.1
    with pytest.raises(BenchmarkError, match=f"{name}: a token's output is off by"):
        verify(name, arm, out)
    out[-1] = torch.nan
    with pytest.raises(BenchmarkError, match=f"{name}: its output is not all written"):
        verify(name, arm, out)


@needs_triton
@pytest.mark.parametrize("name", ["decode", "chunk"])
def test_triton_without_the_turn_or_the_sinks_is_caught(name: str) -> None:
    from vllm_sink.attention.triton import TritonAttention

    kernel = TritonAttention(processors=H100_PROCESSORS)
    given = step(POINTS[name], device_of(kernel))
    out = torch.empty_like(given.query)
    for wrong in (replace(given, turn=None), given.without_sinks(given.geometry.window)):
        wrong.call(kernel, out)()
        with pytest.raises(BenchmarkError, match=f"{name}: a token's output is off by"):
            verify(name, given, out)


class AtOnce:
    """In place of a CUDA graph."""

    def __init__(self, call: Call) -> None:
        self.graph = SimpleNamespace(replay=call)

    def milliseconds(self, turn_ms: int) -> float:
        return 2.0


def exact(given: Step, out: torch.Tensor) -> Call:
    return given.call(ReferenceAttention(), out)


def missing(given: Step, out: torch.Tensor) -> Call:
    raise ImportError("No vLLM.\nIt was not installed.")


def nothing(given: Step, out: torch.Tensor) -> Call:
    return lambda: None


def test_only_rivals_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    point = POINTS["decode"]
    monkeypatch.setattr(attention, "Captured", AtOnce)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))

    def measure(**kernels: Kernel) -> dict[str, Any]:
        given = step(point, "cpu")
        arms = {name: (kernel, given) for name, kernel in kernels.items()}
        monkeypatch.setattr(attention, "arms", lambda *_: arms)
        return attention.measure(point, attention.QUICK, copy_bytes_a_second=1.0)

    record = measure(sinks=exact, vllm=missing, flash=exact)
    assert record["left_out"] == {"vllm": "ImportError: No vLLM."}
    assert record["ratios"].keys() == {"floor/sinks", "sinks/flash"}
    assert record["ms"]["flash"] == {"min": 2.0, "median": 2.0, "max": 2.0}
    with pytest.raises(BenchmarkError, match=r"'decode'.*sinks: its output is not all written"):
        measure(sinks=nothing, vllm=exact)


def test_ratios_are_of_turns_side_by_side() -> None:
    rounds = {"sinks": [2.0, 6.0, 3.0], "window": [1.0, 2.0, 3.0]}
    point = POINTS["decode"]
    record = attention.summary(point, rounds, copy_bytes_a_second=1000 * point.bytes_at_least)
    assert record["ratios"] == {
        "floor/sinks": {"min": 0.1667, "median": 0.3333, "max": 0.5},
        "sinks/window": {"min": 1.0, "median": 2.0, "max": 3.0},
    }
    assert record["ms"]["floor"]["median"] == 1.0


def test_a_point_is_a_line() -> None:
    record = attention.summary(POINTS["chunk"], {"sinks": [0.25], "flash": [0.5]}, 1.0)
    assert attention.line(record) == (
        "prefill, tiny, S + W = 64, 1 x 53 to token 190: "
        "sinks 0.2500 ms, flash 0.5000 ms, sinks/flash 0.500"
    )
    too_large = attention.skipped(POINTS["chunk"], 0)
    assert too_large is not None
    assert "1 x 53 to token 190: its cache takes 0.0 GiB, over" in attention.line(too_large)


def test_the_page_has_a_section_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="some GPU", total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    points = [
        attention.summary(POINTS["chunk"], {"sinks": [0.25], "flash": [0.5]}, 1.0),
        attention.skipped(Point("decode", "Llama-2-7B", 512, 1033), 0),
    ]
    figures = {
        "setup": {"sinks": 4, "dtype": "bfloat16", "near": 4096},
        "copy_bytes_a_second": 3e12,
        "launch_ms": 0.002,
        "points": points,
    }
    results.write(tmp_path / "attention.json", "benchmarks.attention", figures)
    page = report.page(report.gather(tmp_path))
    assert "## Speed: the GPU kernel" in page
    where = "| prefill | tiny | 64 | 190 | 1 | 53 "
    assert f"{where}| sinks 0.25, flash 0.5 | sinks/flash **0.500** |" in page
    assert "| skipped: its cache takes 0.0 GiB, over 40% of the 0.0 that are free | |" in page
    assert " GiB, some GPU, 16.0 GiB · python " in page


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_quick(quick: Callable[[str], Any]) -> None:
    written = quick("attention")
    assert written["machine"]["gpu"]["memory_gib"] > 0
    assert len(written["points"]) == len(attention.QUICK.points())
    for point in written["points"]:
        arms = {"near", "far"} if point["kind"] == "position" else {"sinks"}
        assert arms <= point["ms"].keys()
        assert all(0 < turns["min"] <= turns["max"] for turns in point["ms"].values())
        assert all(ratio["min"] > 0 for ratio in point["ratios"].values())

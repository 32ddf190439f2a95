from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.speed import comparison, parts

DECODE = (
    "decode_ms_a_step",
    "decode_ms_a_step_of_one_stream",
    "decode_ms_a_step_over_window",
)


def test_ratios_are_of_rounds_side_by_side() -> None:
    assert comparison([2.0, 6.0, 3.0], [1.0, 2.0, 3.0])["ratio"] == {
        "min": 1.0,
        "median": 2.0,
        "max": 3.0,
    }


def test_a_step_is_split_by_what_operators_are_for() -> None:
    operators = {"vllm_sink::attend": 4.0, "_C::onednn_mm": 2.0, "aten::mm": 1.0, "aten::mul": 0.5}
    assert parts(operators) == {
        "matrix products": 3.0,
        "attention": 4.0,
        "writing to the cache": 0.0,
        "other operators": 0.5,
    }


@pytest.mark.slow
def test_quick(quick: Callable[[str], Any]) -> None:
    written = quick("speed")
    for name in (*DECODE, "prefill_tokens_a_second"):
        for arm in ("ours", "other", "ratio"):
            spread = written[name][arm]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    for name in DECODE:
        for spent in written[name]["parts"].values():
            assert all(milliseconds > 0 for milliseconds in spent.values())

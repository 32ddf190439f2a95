from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.speed import comparison


def test_ratios_are_of_rounds_side_by_side() -> None:
    assert comparison([2.0, 6.0, 3.0], [1.0, 2.0, 3.0])["ratio"] == {
        "min": 1.0,
        "median": 2.0,
        "max": 3.0,
    }


@pytest.mark.slow
def test_quick(quick: Callable[[str], Any]) -> None:
    written = quick("speed")
    for name in (
        "decode_ms_a_step",
        "decode_ms_a_step_over_window",
        "prefill_tokens_a_second",
    ):
        for arm in ("ours", "other", "ratio"):
            spread = written[name][arm]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]

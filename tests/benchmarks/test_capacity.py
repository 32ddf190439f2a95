from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.capacity import QUICK, Plan


def test_bound_is_of_whole_streams() -> None:
    # A block with the sinks, and 63 tokens before the last one: in 3 blocks at worst.
    plan = Plan(sink_tokens=4, window_tokens=64, pool_blocks=4 * 7 + 3)
    assert plan.bound == 7


@pytest.mark.slow
def test_quick(quick: Callable[[str], Any]) -> None:
    written = quick("capacity")
    assert written["sink_over_bound"] >= 0.98
    assert written["sink"]["preemptions"] == 0
    assert written["sink"]["kv_blocks"] <= QUICK.pool_blocks
    assert written["sink"]["streaming"] > written["dense"]["streaming"]
    assert written["dense"]["streaming"] == written["dense"]["offered"]
    assert quick("capacity") == written

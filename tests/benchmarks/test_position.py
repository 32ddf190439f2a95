from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.position import SINK, Pair, Place
from vllm_sink.geometry import Geometry


def test_ratios_are_of_turns_side_by_side() -> None:
    pair = Pair(9, at_near=Place([1.0, 2.0, 4.0]), at_far=Place([2.0, 2.0, 2.0]))
    assert pair.summary()["ratio"] == {"min": 0.5, "median": 1.0, "max": 2.0}


@pytest.mark.slow
def test_quick(quick: Callable[[str], Any]) -> None:
    (pair,) = quick("position")["pairs"]
    geometry = Geometry(SINK["sink"]["sink_tokens"], SINK["sink"]["window_tokens"])
    for place in (pair["near"], pair["far"]):
        assert 0 < min(place["kv_blocks"]) <= max(place["kv_blocks"]) <= geometry.max_blocks(128)
        assert place["step_ms"]["min"] > 0

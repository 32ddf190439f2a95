from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.position import SINK
from vllm_sink.geometry import Geometry


@pytest.mark.slow
def test_quick(quick: Callable[[str], Any]) -> None:
    written = quick("position")
    geometry = Geometry(SINK["sink"]["sink_tokens"], SINK["sink"]["window_tokens"])
    for place in (written["near"], written["far"]):
        assert 0 < min(place["kv_blocks"]) <= max(place["kv_blocks"]) <= geometry.max_blocks(128)
        assert place["step_ms"]["min"] > 0

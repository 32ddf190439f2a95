from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.recompute import QUICK


@pytest.mark.slow
def test_quick(quick: Callable[[str], Any]) -> None:
    written = quick("recompute")
    assert [row["cache"] for row in written["rows"]] == list(QUICK.caches)
    for row in written["rows"]:
        assert 0 < row["ours_floor_ms"] <= row["ours_ms"]["min"]
        assert 0 < row["recompute_floor_ms"] <= row["recompute_ms"]["min"]
    assert quick("recompute") == written

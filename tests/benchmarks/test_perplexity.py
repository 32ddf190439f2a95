from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.perplexity import PLAN, Recompute


def test_all_arms_with_a_bounded_cache_have_the_same() -> None:
    sizes = {
        arm.sink.get("sink_tokens", 0) + arm.sink["window_tokens"]
        for arm in PLAN.arms
        if arm.sink and "window_tokens" in arm.sink
    }
    assert sizes == {PLAN.recompute.cache}


def test_sampled_tokens_have_a_full_cache_before_them() -> None:
    positions = Recompute("", tokens=100, cache=64, samples=36).positions
    assert positions == list(range(64, 100))
    assert all(a < b for a, b in pairwise(PLAN.recompute.positions))


@pytest.mark.slow
def test_quick_resumes(quick: Callable[[str], Any], tmp_path: Path) -> None:
    def read_at() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "perplexity").iterdir()}

    written = quick("perplexity")
    arms = {name: arm["perplexity"] for name, arm in written["arms"].items()}
    assert arms["window"] > 1.2 * arms["sink-4"]
    assert written["recompute"]["sink_over_recompute"]["ratio"] == pytest.approx(1, abs=0.25)
    before = read_at()
    assert len(before) == len(written["arms"]) + 1
    assert quick("perplexity")["arms"] == written["arms"]
    assert read_at() == before

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.perplexity import by_thousand, far_over_fresh, perplexity, spreads


def test_perplexity_of_even_odds() -> None:
    assert perplexity([math.log(2)] * 10) == pytest.approx(2)


def test_thousands_count_from_the_first_token_which_has_no_likelihood() -> None:
    nll = [0.0] * 999 + [math.log(3)] * 500
    assert by_thousand(nll) == pytest.approx([1, 3])


def test_spreads_part_at_the_trained_context() -> None:
    nll = [math.log(3)] * 999 + [math.log(2)] * 8000 + [math.log(5)] * 1000
    found = spreads(nll)
    assert found["earlier"] == pytest.approx((2, 3))
    assert found["later"] == pytest.approx((2, 5))


def test_a_late_text_is_compared_thousand_by_thousand_with_its_own_stream() -> None:
    far = [math.log(9)] * 1999 + [math.log(7)] * 1000 + [math.log(6)] * 1000
    fresh = [math.log(8)] * 999 + [math.log(3)] * 1000
    assert far_over_fresh(far, fresh) == pytest.approx([2])


@pytest.mark.slow
def test_quick_resumes(quick: Callable[[str], Any], tmp_path: Path) -> None:
    def read_at() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "perplexity").iterdir()}

    arms = quick("perplexity")["arms"]
    assert all(1 < arm["perplexity"] < 1000 for arm in arms.values())
    before = read_at()
    assert len(before) == len(arms)
    assert quick("perplexity")["arms"] == arms
    assert read_at() == before

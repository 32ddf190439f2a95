import math

import pytest

from benchmarks.texts.likelihood import by_thousand, far_over_fresh, perplexity, ratio


def test_perplexity_of_even_odds() -> None:
    assert perplexity([math.log(2)] * 10) == pytest.approx(2)


def test_thousands_count_from_the_first_token_which_has_no_likelihood() -> None:
    nll = [0.0] * 999 + [math.log(3)] * 500
    assert by_thousand(nll) == pytest.approx([1, 3])


def test_ratio_is_of_perplexities_on_the_same_tokens() -> None:
    found = ratio([math.log(2), math.log(8)], [math.log(2), math.log(2)])
    assert found["ratio"] == pytest.approx(2)
    # Differences 0 and log 4: their standard deviation is log 4 / sqrt 2, that of the mean log 2.
    assert found["standard_error"] == pytest.approx(2 * math.log(2), abs=1e-4)


def test_a_late_text_is_compared_token_by_token_with_its_own_stream() -> None:
    """The fresh stream begins at token 1,500 of 4,000, in the middle of a thousand."""
    far = [math.log(9)] * 2499 + [math.log(7)] * 1000 + [math.log(6)] * 500
    fresh = [math.log(8)] * 999 + [math.log(3)] * 1000 + [math.log(2)] * 500
    assert far_over_fresh(far, fresh) == pytest.approx([7 / 3, 3])

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.streameval import QUICK, Fact, Stream, streams, wilson
from vllm_sink import embedded


def test_wilson() -> None:
    # The textbook's figures for 0 and for 5 of 10.
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_the_answer_is_repeated_at_the_distance() -> None:
    stream = Stream(list(range(100)), [])
    asked = stream.asked(Fact(question=[7, 8, 9], answer=0, position=20), distance=30)
    assert len(asked) == 20 + 30
    assert asked == [*range(47), 7, 8, 9]


def test_facts_lie_where_they_say_past_a_full_cache() -> None:
    for stream in streams(QUICK, embedded.path()):
        assert len(stream.tokens) == QUICK.stream_tokens
        assert len({tuple(fact.question) for fact in stream.facts}) == QUICK.facts
        for fact in stream.facts:
            assert fact.position >= QUICK.cache
            assert stream.tokens[fact.position] == fact.answer
            assert stream.tokens[: fact.position][-len(fact.question) :] == fact.question


@pytest.mark.slow
def test_quick_knows_what_is_in_sight_alone(quick: Callable[[str], Any]) -> None:
    inside, beyond = quick("streameval")["arms"]["sink"]
    assert inside["accuracy"] >= 0.5
    assert beyond["accuracy"] <= 0.25

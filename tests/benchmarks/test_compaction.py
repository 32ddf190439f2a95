import math
from collections.abc import Callable
from statistics import stdev
from typing import Any

import pytest

from benchmarks.compaction import PLAN, Crossing, Reading, Timing, across, crossed, shares
from vllm_sink.buffer import Buffer

READING = Reading(Buffer(sinks=2, window=6, mark=16), tokens=42, after=4, soon=1)


def test_a_text_is_read_after_each_of_its_compactions() -> None:
    counts = [READING.buffer.compactions(prompt=8, tokens=n) for n in range(READING.tokens)]
    compacted = [n for n in range(1, len(counts)) if counts[n] > counts[n - 1]]
    assert [*READING.places] == compacted[:-1] == [16, 24, 32]
    assert compacted[-1] + READING.after > READING.tokens


def test_each_compaction_is_one_sample() -> None:
    uncompacted = [[1.0, 2.0, 3.0, 4.0], [2.0] * 4, [3.0] * 4]
    compacted = [[1.3, 2.3, 3.3, 4.3], [1.8] * 4, [3.6, 3.2, 3.0, 3.0]]
    found = across(READING, compacted, uncompacted)
    differences = [0.3, -0.2, 0.2]
    ratio = math.exp(sum(differences) / 3)
    assert found["ratio"]["ratio"] == pytest.approx(ratio, abs=1e-4)
    error = ratio * stdev(differences) / math.sqrt(3)
    assert found["ratio"]["standard_error"] == pytest.approx(error, abs=1e-4)
    assert found["soon"]["ratio"] == pytest.approx(math.exp((0.3 - 0.2 + 0.6) / 3), abs=1e-4)
    assert [point["tokens"] for point in found["points"]] == [16, 24, 32]
    assert [point["ratio"] for point in found["points"]] == pytest.approx(
        [math.exp(difference) for difference in differences], abs=1e-4
    )


def test_every_stream_is_read_anew_once_a_period() -> None:
    plan = Timing(cache=100, streams=(2,), marks=(2, 11))
    row = shares(plan, 2, reads=[30.0, 60.0, 90.0], steps=[1.0, 2.0, 3.0])
    assert row["read_over_step"] == {"min": 30.0, "median": 30.0, "max": 30.0}
    assert row["share"] == {"2": 0.6, "11": 0.06}


@pytest.mark.parametrize("plan", [PLAN.crossing, Crossing(Buffer(2, 6, 16), compactions=3)])
def test_the_last_step_of_a_period_compacts(plan: Crossing) -> None:
    buffer, prompt = plan.buffer, plan.buffer.kept
    steps = range(plan.compactions * plan.period)
    # A step begins with the tokens of those before it, and the first one of the prompt's own step.
    counts = [buffer.compactions(prompt, prompt + 1 + step) for step in steps]
    compacting = [step for step in steps if counts[step] > (counts[step - 1] if step else 0)]
    seconds = [0.5 if step in compacting else 0.01 for step in steps]
    found = crossed(plan, reads=[0.4, 0.5, 0.7], seconds=seconds)
    assert found["compacting_ms"] == [500.0] * plan.compactions
    assert found["share"] == found["expected"] == round(0.5 / (0.01 * plan.period), 5)


@pytest.mark.slow
def test_quick(quick: Callable[[str], Any]) -> None:
    written = quick("compaction")
    assert written["quality"]["ratio"]["ratio"] == pytest.approx(1, abs=0.1)
    for row in written["cost"]:
        assert 1 > row["share"]["4"] > row["share"]["32"] > 0
    crossing = written["crossing"]
    assert min(crossing["compacting_ms"]) > 2 * crossing["step_ms"]

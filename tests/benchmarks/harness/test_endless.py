from typing import Any

import pytest

from benchmarks.harness.endless import BUFFER, EVERY, PROMPT, SETTLED, STRETCH, Stream, summary

MARK = BUFFER.mark
LONG_ENOUGH = SETTLED // EVERY + 2 * STRETCH + 1


@pytest.mark.parametrize("until", [PROMPT, MARK - 1, MARK, MARK + 1, 3 * MARK])
@pytest.mark.parametrize("at_once", [1, 7])
def test_it_keeps_what_the_buffer_holds(until: int, at_once: int) -> None:
    """Each token of this stream is its place in it."""
    stream = Stream(PROMPT, [*range(PROMPT)])
    for start in range(PROMPT, until, at_once):
        stream.take([*range(start, min(start + at_once, until))])
    assert stream.position == until
    assert stream.tokens == BUFFER.stream_positions(PROMPT, until)


def samples(count: int, ms_a_token: float, slower: float = 1, grown: float = 0) -> list[Any]:
    """Of a server whose second half is so many times slower, and which grows by so many MiB."""
    made, seconds = [], 0.0
    for i in range(count):
        seconds += EVERY * ms_a_token / 1000 * (slower if 2 * i > count else 1)
        use = {"cpu_s": seconds / 2, "rss_mib": 100 + grown * i / (count - 1)}
        made.append(
            {
                "position": (i + 1) * EVERY,
                "seconds": seconds,
                "engine": use,
                "front_end": use | {"rss_mib": 50.0},
                "kv_blocks": 5 + i % 2,
            }
        )
    return made


def test_a_server_that_ended_too_early_is_left_out() -> None:
    assert summary([samples(LONG_ENOUGH - 1, 2.0), []]) == []
    assert len(summary([samples(LONG_ENOUGH, 2.0), []])) == 1


def test_a_server_that_stays_as_it_is() -> None:
    (row,) = summary([samples(50, 2.0)])
    assert (row["from"], row["to"]) == (SETTLED + EVERY, 50 * EVERY)
    assert row["wall"] == {"first_ms": 2.0, "last_ms": 2.0, "ratio": 1.0}
    assert row["engine_cpu"] == {"first_ms": 1.0, "last_ms": 1.0, "ratio": 1.0}
    assert row["engine_grown_mib"] == row["front_end_grown_mib"] == 0
    assert row["kv_blocks"] == 6


def test_a_server_that_grows_and_gets_slower() -> None:
    (row,) = summary([samples(50, 2.0, slower=1.5, grown=49.0)])
    assert row["wall"]["ratio"] == row["front_end_cpu"]["ratio"] == 1.5
    # Once it has settled.
    assert row["engine_grown_mib"] == 49 - SETTLED // EVERY
    assert row["front_end_grown_mib"] == 0

from benchmarks.text import passages


def test_passages_are_spread_over_the_text() -> None:
    assert passages(list(range(10)), count=2, length=4) == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert passages(list(range(4)), count=2, length=4) == [[0, 1, 2, 3], [0, 1, 2, 3]]

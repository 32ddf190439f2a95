from benchmarks.texts.passages import draw, passages


def test_passages_are_spread_over_the_text() -> None:
    assert passages(list(range(10)), count=2, length=4) == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert passages(list(range(4)), count=2, length=4) == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_no_two_clients_read_the_same_passage_whatever_their_number() -> None:
    drawn = draw([*range(130)], turns=[1, 2, 4, 4], length=10)
    assert [len(turn) for turn in drawn] == [1, 2, 4, 4]
    tokens = [token for turn in drawn for passage in turn for token in passage]
    assert len(set(tokens)) == len(tokens)
    assert drawn == draw([*range(130)], turns=[1, 2, 4, 4], length=10)

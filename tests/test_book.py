from launch.book import book


def test_book_is_there() -> None:
    assert "OPTICKS" in book()[:5000].upper()

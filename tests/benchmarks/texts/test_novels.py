import zlib
from pathlib import Path

import pytest

from benchmarks.harness import cli
from benchmarks.texts import novels


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(cli.BenchmarkError, match=r"run `python -m benchmarks\.texts\.novels`"):
        novels.text()


def test_strings_of_an_entry_ascii_or_not() -> None:
    head = b"X\n\x00\x00\x00\x03"
    lines = b"\x00\x04\x00\x09\x00\x00\x00\x04EMMA" + b"\x00\x00\x80\x09\x00\x00\x00\x04\xc2\xa35!"
    entry = zlib.compress(head + lines)
    database = 2 * (len(entry).to_bytes(4) + entry)
    found = [line for novel in novels._entries(database) for line in novels._strings(novel)]
    assert found == 2 * ["EMMA", "£5!"]


def test_six_novels() -> None:
    novels.fetch()
    text = novels.text()
    assert text.startswith("EMMA\n\nBy Jane Austen")
    assert text.count("\nCHAPTER I\n") + text.count("\nChapter 1\n") >= 6
    assert 4_000_000 < len(text) < 4_100_000

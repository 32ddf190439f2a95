from pathlib import Path

import pytest

from benchmarks.harness import cli, debian

LIBRARY = "usr/lib/*/liblzf.so.1"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_unpacked_once() -> None:
    debian.fetch("lzf", "liblzf1")
    (library,) = debian.folder("lzf").glob(LIBRARY)
    library.unlink()
    debian.fetch("lzf", "liblzf1")
    assert not list(debian.folder("lzf").glob(LIBRARY))


def test_a_version_that_debian_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "debian.lock"
    lock.write_text("liblzf1=0.1-1\n")
    monkeypatch.setattr(debian, "LOCK", lock)
    debian.fetch("lzf", "liblzf1")
    assert list(debian.folder("lzf").glob(LIBRARY))


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "debian.lock"
    lock.write_text("liblzf1=3.6-3\nnot-a-package=0\n")
    monkeypatch.setattr(debian, "LOCK", lock)
    with pytest.raises(cli.BenchmarkError, match=r"^apt-get could not download not-a-package, "):
        debian.fetch("lzf", "liblzf1", "not-a-package")
    assert not list((tmp_path / "vllm_sink").iterdir())

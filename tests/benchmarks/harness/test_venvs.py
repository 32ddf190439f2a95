import subprocess
from pathlib import Path

import pytest

from benchmarks.harness import cli, venvs


def test_every_environment_has_a_lock() -> None:
    assert venvs.NAMES
    for name in venvs.NAMES:
        assert venvs._lock(name).exists()


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = r"run `python -m benchmarks\.harness\.venvs llamacpp`"
    with pytest.raises(cli.BenchmarkError, match=told):
        venvs.python("llamacpp")


@pytest.mark.slow
def test_installed_once_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    venvs.install("llamacpp")
    python = venvs.python("llamacpp")
    assert python.is_relative_to(tmp_path)
    subprocess.run([python, "-I", "-c", "import xllamacpp"], check=True)
    assert subprocess.run([python, "-I", "-c", "import vllm"], capture_output=True).returncode
    built = python.lstat()
    venvs.install("llamacpp")
    assert python.lstat() == built


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = tmp_path / "requirements"
    (requirements / "venvs").mkdir(parents=True)
    for suffix in ("in", "lock"):
        (requirements / "venvs" / f"broken.{suffix}").write_text("not-a-package==0\n")
    monkeypatch.setattr(venvs, "REQUIREMENTS", requirements)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(cli.BenchmarkError, match=r"'broken' was not built: uv failed"):
        venvs.install("broken")
    assert not list((tmp_path / "vllm_sink" / "venvs").iterdir())

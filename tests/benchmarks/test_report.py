import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.harness import plots
from benchmarks.harness.cli import COMMITTED, BenchmarkError


def test_no_results_at_all(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="No results in"):
        report.gather(tmp_path)


def test_one_page_of_what_there_is(tmp_path: Path) -> None:
    for file in COMMITTED.glob("*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / "speed.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.report", "--results", tmp_path]
    subprocess.run(command, check=True)
    page = (tmp_path / "README.md").read_text("utf-8")
    assert "run `python -m benchmarks.speed`" in page
    peers = json.loads((tmp_path / "peers.json").read_text("utf-8"))
    assert f"| vllm_sink | {peers['arms']['vllm_sink']['perplexity']:.3f} |" in page
    pictures = [name for name in plots.DRAW if (tmp_path / f"{name}.json").exists()]
    assert pictures
    for picture in pictures:
        assert f"]({picture}.png)" in page
        assert (tmp_path / f"{picture}.png").stat().st_size > 5_000


@pytest.mark.parametrize("name", report.NAMES)
def test_any_may_be_missing(name: str) -> None:
    report.page(report.gather(COMMITTED) | {name: None})


def test_the_committed_page_is_made_from_the_committed_results() -> None:
    page = (COMMITTED / "README.md").read_text("utf-8")
    assert page == report.page(report.gather(COMMITTED))

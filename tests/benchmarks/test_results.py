import json
import socket
from pathlib import Path

import pytest

from benchmarks.results import folder, parser, spread, write


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.00004]) == {"min": 1.0, "median": 2.0, "max": 3.0}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], "benchmarks/results"),
        (["--quick"], "build/benchmarks"),
        (["--quick", "--results", "here"], "here"),
    ],
)
def test_a_quick_run_never_replaces_committed_results(line: list[str], expected: str) -> None:
    assert folder(parser("").parse_args(line)) == Path(expected)


def test_written_with_its_circumstances_but_no_host(tmp_path: Path) -> None:
    write(tmp_path / "new" / "x.json", "benchmarks.x", {"figure": 1})
    text = (tmp_path / "new" / "x.json").read_text("utf-8")
    record = json.loads(text)
    assert record["figure"] == 1
    assert record["machine"]["cores"] >= 1
    assert "torch" in record["versions"]
    assert record["command"].startswith("python -m benchmarks.x")
    assert socket.gethostname() not in text

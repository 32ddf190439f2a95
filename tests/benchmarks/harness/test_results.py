import json
import socket
from pathlib import Path

import pytest

from benchmarks.harness import results
from benchmarks.harness.results import spread, stored, write


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.00004]) == {"min": 1.0, "median": 2.0, "max": 3.0}


def test_written_with_its_circumstances_but_no_host(tmp_path: Path) -> None:
    write(tmp_path / "new" / "x.json", "benchmarks.x", {"figure": 1})
    text = (tmp_path / "new" / "x.json").read_text("utf-8")
    record = json.loads(text)
    assert record["figure"] == 1
    assert record["machine"]["cores"] >= 1
    assert "torch" in record["versions"]
    assert record["command"].startswith("python -m benchmarks.x")
    assert socket.gethostname() not in text


def test_what_is_stored_counts_for_the_same_setup_code_and_versions_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    setup = {"sizes": (1, 2)}
    assert stored(path, setup, fresh=False) is None
    write(path, "benchmarks.x", {"setup": setup, "figure": 1})
    record = stored(path, setup, fresh=False)
    assert record is not None
    assert record["figure"] == 1
    assert stored(path, setup, fresh=True) is None
    assert stored(path, {"sizes": (1, 3)}, fresh=False) is None
    with monkeypatch.context() as changed:
        changed.setattr(results, "code", lambda: "another kernel")
        assert stored(path, setup, fresh=False) is None
    monkeypatch.setattr(results, "versions", lambda: {"vllm": "1"})
    assert stored(path, setup, fresh=False) is None


def test_figures_that_are_kept_get_the_circumstances_of_the_last_call(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write(path, "benchmarks.x", {"setup": {}, "command": "an earlier one"})
    assert json.loads(path.read_text("utf-8"))["command"].startswith("python -m benchmarks.x")

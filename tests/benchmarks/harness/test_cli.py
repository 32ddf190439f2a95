import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.cli import folder, parser, positive, run


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


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_not_a_positive_integer(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = parser("")
    options.add_argument("--clients", type=positive)
    with pytest.raises(SystemExit) as error:
        options.parse_args(["--clients", text])
    assert error.value.code == 2
    assert f"--clients: {text} is not a positive integer" in capsys.readouterr().err


def test_an_error_is_a_sentence_and_a_status(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "from benchmarks.harness import cli\n"
        "def main(): raise cli.BenchmarkError('No server answers.')\n"
        "cli.run(main)"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=False)
    assert ended.returncode == 1
    assert capfd.readouterr().err == "No server answers.\n"


def test_other_errors_keep_their_trace() -> None:
    def main() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run(main)


def test_interrupted() -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="kept"):
        run(main)

"""What every benchmark's command line has in common."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path

COMMITTED = Path("benchmarks/results")
THROWN_AWAY = Path("build/benchmarks")


class BenchmarkError(Exception):
    """A sentence for the user: what cannot be measured, and what would help."""


def parser(description: str | None, resumable: bool = False) -> ArgumentParser:
    """The options that every benchmark has; the first paragraph of `description` is its help."""
    options = ArgumentParser(description=(description or "").split("\n\n")[0])
    options.add_argument("--quick", action="store_true", help="a short run that proves nothing")
    if resumable:
        options.add_argument(
            "--fresh", action="store_true", help="measure again what is already there"
        )
    options.add_argument(
        "--results",
        type=Path,
        help=f"folder for the JSON (default: {COMMITTED}, or {THROWN_AWAY} with --quick)",
    )
    return options


def folder(options: Namespace) -> Path:
    chosen: Path | None = options.results
    return chosen or (THROWN_AWAY if options.quick else COMMITTED)


def positive(text: str) -> int:
    """An argument's type: an integer above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def run(main: Callable[[], None]) -> None:
    """End the process with `main`; a BenchmarkError becomes one line on stderr and status 1."""
    try:
        main()
    except BenchmarkError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("Stopped; what was finished is kept.")

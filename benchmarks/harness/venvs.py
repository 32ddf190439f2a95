"""Virtual environments for what cannot share ours: guests, the load generator, tests' Triton.

    python -m benchmarks.harness.venvs attention_sinks llamacpp load

builds them under ~/.cache/vllm_sink from `requirements/venvs/*.lock`.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from benchmarks.harness import cli
from vllm_sink import cache

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
GUESTS = Path(__file__).parents[1] / "guests"
NAMES = sorted(path.stem for path in (REQUIREMENTS / "venvs").glob("*.in"))
WITH_TORCH = {"attention_sinks"}


def python(name: str) -> Path:
    """The interpreter of environment `name`.

    Raises:
        BenchmarkError: it is not built.
    """
    interpreter = _folder(name) / "bin" / "python"
    if not interpreter.exists():
        raise cli.BenchmarkError(
            f"The environment {name!r} is missing: run `python -m benchmarks.harness.venvs {name}`."
        )
    return interpreter


def isolated(name: str) -> list[str]:
    """The command line, but for a script of `GUESTS` and what it is told, in environment `name`.

    Raises:
        BenchmarkError: it is not built.
    """
    # Isolated: modules beside the script must not stand in for those it imports.
    return [str(python(name)), "-I"]


def packages(name: str) -> list[str]:
    """Where environment `name` keeps its packages, for `sys.path`."""
    return [str(folder) for folder in python(name).parents[1].glob("lib/python*/site-packages")]


def install(name: str) -> None:
    """Build environment `name`, unless it is there; a build that fails leaves nothing.

    Raises:
        BenchmarkError: with the name of the tool that failed; its own words are on stderr.
    """
    target = _folder(name)
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        unfinished = Path(scratch, target.name)
        for command in _commands(name, unfinished):
            if subprocess.run(command).returncode:
                tool = command[2]
                raise cli.BenchmarkError(f"The environment {name!r} was not built: {tool} failed.")
        with suppress(OSError):  # another process was first
            unfinished.rename(target)


def _commands(name: str, target: Path) -> Iterator[list[str]]:
    uv = [sys.executable, "-m", "uv"]
    python = str(target / "bin" / "python")
    # Relocatable: it is renamed when it is complete.
    yield [*uv, "venv", "-q", "--seed", "--relocatable", "-p", sys.executable, str(target)]
    locked = ["--no-deps", "--require-hashes", "--compile-bytecode", "-r", str(_lock(name))]
    yield [*uv, "pip", "install", "-q", "--python", python, *locked]
    if name in WITH_TORCH:
        index = os.environ.get("TORCH_INDEX")
        torch = ["--no-deps", "-r", str(REQUIREMENTS / "torch.lock")]
        also = ["--extra-index-url", index] if index else []
        yield [python, "-m", "pip", "install", "-q", *torch, *also]


def _lock(name: str) -> Path:
    return REQUIREMENTS / "venvs" / f"{name}.lock"


def _folder(name: str) -> Path:
    key = hashlib.sha256(_lock(name).read_bytes() + sys.version.encode()).hexdigest()[:12]
    return cache.folder() / "venvs" / f"{name}-{key}"


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="name", help=", ".join(NAMES))
    console = Console()
    for name in parser.parse_args().names:
        with console.status(f"building {name}"):
            install(name)
        console.print(f"{name}: {python(name)}")


if __name__ == "__main__":
    cli.run(main)

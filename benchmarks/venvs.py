"""Virtual environments for what cannot share ours: peers with other versions, the load generator.

    python -m benchmarks.venvs attention_sinks llamacpp load

builds them under ~/.cache/vllm_sink from `requirements/venvs/*.lock`.
"""

import hashlib
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

from rich.console import Console

from benchmarks import cli
from vllm_sink import cache

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
NAMES = sorted(path.stem for path in (REQUIREMENTS / "venvs").glob("*.in"))
WITH_TORCH = "# with torch"


def python(name: str) -> Path:
    """The interpreter of environment `name`.

    Raises:
        BenchmarkError: it is not built.
    """
    interpreter = _folder(name) / "bin" / "python"
    if not interpreter.exists():
        raise cli.BenchmarkError(
            f"The environment {name!r} is missing: run `python -m benchmarks.venvs {name}`."
        )
    return interpreter


def install(name: str) -> None:
    """Build environment `name`, unless it is there; a build that fails leaves nothing.

    Raises:
        BenchmarkError: with the name of the tool that failed; its own words are on stderr.
    """
    target = _folder(name)
    if target.exists():
        return
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    uv = [sys.executable, "-m", "uv"]
    into = ["--python", str(unfinished / "bin" / "python")]
    locked = ["--no-deps", "--require-hashes", "--compile-bytecode", "-r", str(_lock(name))]
    commands = [
        # Relocatable: it is renamed when it is complete.
        [*uv, "venv", "-q", "--seed", "--relocatable", "-p", sys.executable, str(unfinished)],
        [*uv, "pip", "install", "-q", *into, *locked],
    ]
    if WITH_TORCH in _lock(name).with_suffix(".in").read_text(encoding="utf-8").splitlines():
        torch = ["--no-deps", "-r", str(REQUIREMENTS / "torch.lock")]
        commands.append([into[1], "-m", "pip", "install", "-q", *torch])
    for command in commands:
        if subprocess.run(command).returncode:
            raise cli.BenchmarkError(
                f"The environment {name!r} was not built: {command[2]} failed."
            )
    unfinished.rename(target)


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

"""Debian packages, unpacked into ~/.cache/vllm_sink and not installed: no root, and no service."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.harness import cli
from vllm_sink import cache

LOCK = Path(__file__).parents[2] / "requirements" / "debian.lock"


def folder(name: str) -> Path:
    """Where the packages of `name` are unpacked."""
    return cache.folder() / name


def fetch(name: str, *packages: str) -> None:
    """Unpack `packages` into the folder of `name`, unless it is there.

    Raises:
        BenchmarkError: apt-get or dpkg failed; their own words are on stderr.
    """
    if folder(name).exists():
        return
    with tempfile.TemporaryDirectory(dir=cache.folder()) as scratch:
        for package in packages:
            # Debian drops a version when the next one comes.
            versions = (_locked(package), package)
            if all(_fails(["apt-get", "-q", "download", version], scratch) for version in versions):
                raise cli.BenchmarkError(f"apt-get could not download {package}, a Debian package.")
            (archive,) = Path(scratch).glob(f"{package}_*.deb")
            if _fails(["dpkg-deb", "-x", archive.name, "unpacked"], scratch):
                raise cli.BenchmarkError(f"dpkg-deb could not unpack {package}.")
        Path(scratch, "unpacked").rename(folder(name))


def _locked(package: str) -> str:
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    (locked,) = (line for line in lines if line.startswith(f"{package}="))
    return locked


def _fails(command: list[str], folder: str) -> bool:
    return not shutil.which(command[0]) or subprocess.run(command, cwd=folder).returncode != 0

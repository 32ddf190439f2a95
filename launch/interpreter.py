"""What a Python has of what a check needs; `python -m launch.interpreter` says it of its own."""

import json
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "triton", "vllm", "pytest", "hypothesis")


@dataclass(frozen=True)
class Interpreter:
    path: str
    versions: dict[str, str]
    """Its own, and those of PACKAGES that are installed."""
    finds_gpu: bool
    """Its torch does."""

    @classmethod
    def at(cls, path: str) -> "Interpreter":
        command = [path, "-m", "launch.interpreter"]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return cls(path, **json.loads(answer.stdout))

    def missing(self, packages: tuple[str, ...]) -> list[str]:
        return [package for package in packages if package not in self.versions]

    def why_no_gpu(self) -> str:
        torch = self.versions.get("torch")
        return f"torch {torch} finds none" if torch else "there is no torch"


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Of this Python, and of those packages that it has."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def finds_gpu() -> bool:
    try:
        import torch
    except (ImportError, OSError):  # a library of CUDA's may be missing
        return False
    return bool(torch.cuda.is_available())


if __name__ == "__main__":
    print(json.dumps({"versions": versions(), "finds_gpu": finds_gpu()}))

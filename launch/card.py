"""The machine's NVIDIA GPU, as its driver names it."""

import re
import subprocess
from dataclasses import dataclass

QUERY = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]


@dataclass(frozen=True)
class Card:
    name: str
    driver: str

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def find() -> Card | None:
    """The first one, if there is one."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if answer.returncode or not answer.stdout:
        return None
    name, driver = answer.stdout.splitlines()[0].split(", ")
    return Card(name, driver)

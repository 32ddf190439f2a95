"""Jane Austen's six novels, a long text that is plain English throughout (about 930,000 tokens).

    python -m benchmarks.texts.novels

fetches them: a Debian package of 1.6 MB, unpacked into ~/.cache/vllm_sink and not installed.
"""

import re
import zlib
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import cli, debian

PACKAGE = "r-cran-janeaustenr"
DATA = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
STRING = re.compile(rb"(?s:(?:\x00\x04\x00|\x00\x00\x80)\t(.{4}))")
"""An ASCII or UTF-8 string's head in R's serialisation, and its length ("R Internals", 1.8)."""


def text() -> str:
    """All six, one after the other, in the order of their titles from "Emma" on.

    Raises:
        BenchmarkError: they have not been fetched.
    """
    data = debian.folder("novels") / DATA
    if not data.exists():
        raise cli.BenchmarkError("The novels are missing: run `python -m benchmarks.texts.novels`.")
    return "\n".join(line for novel in _entries(data.read_bytes()) for line in _strings(novel))


def fetch() -> None:
    """Raises BenchmarkError where apt-get or dpkg fail; their own words are on stderr."""
    debian.fetch("novels", PACKAGE)


def _entries(database: bytes) -> Iterator[bytes]:
    """R's lazy-load database: each object after its length, 4 bytes, compressed by zlib."""
    while database:
        entry = zlib.decompressobj()
        yield entry.decompress(database[4:])
        database = entry.unused_data


def _strings(serialised: bytes) -> Iterator[str]:
    end = 0
    while head := STRING.search(serialised, end):
        end = head.end() + int.from_bytes(head[1])
        yield serialised[head.end() : end].decode()


def main() -> None:
    ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    fetch()
    print(f"{len(text()):,} characters")


if __name__ == "__main__":
    cli.run(main)

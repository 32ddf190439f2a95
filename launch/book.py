"""Real text: Newton's *Opticks*, which the package `apache-tvm-ffi` carries and vLLM requires."""

from importlib.util import find_spec
from pathlib import Path

BOOK = "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"


def book() -> str:
    """567 KB of English prose."""
    package = find_spec("tvm_ffi")
    assert package is not None
    assert package.origin is not None
    return (Path(package.origin).parent / BOOK).read_text(encoding="utf-8")

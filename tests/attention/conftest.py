"""The implementations. Triton's kernel runs where there is a GPU, or in its interpreter:

TRITON_INTERPRET=1 pytest tests/attention
"""

import sys
from importlib.util import find_spec
from typing import Any

import pytest

from benchmarks import venvs
from tests.attention.cases import INTERPRETED, needs_compiler, needs_triton
from vllm_sink.attention.cpu import CPUAttention, load
from vllm_sink.attention.interface import Attention
from vllm_sink.attention.reference import ReferenceAttention

if INTERPRETED and not find_spec("triton"):
    # Apart from .venv, where vLLM's CPU build would complain of it in every log.
    sys.path += venvs.packages("triton")

H100_PROCESSORS = 132


@pytest.fixture(autouse=INTERPRETED)
def dots_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's interpreter keeps bfloat16 as uint16, and multiplies these as they are."""
    import numpy
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(x: Any) -> Any:
        if x.dtype.scalar != bfloat16:
            return x
        return TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), float32)

    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


KERNELS = [
    pytest.param("cpu", marks=needs_compiler),
    pytest.param("triton", marks=needs_triton),
]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Attention:
    return named(request.param)


@pytest.fixture(params=[*KERNELS, "reference"])
def implementation(request: pytest.FixtureRequest) -> Attention:
    return named(request.param)


def named(name: str) -> Attention:
    if name == "reference":
        return ReferenceAttention()
    if name == "cpu":
        load()
        return CPUAttention()
    from vllm_sink.attention.triton import TritonAttention

    return TritonAttention(processors=H100_PROCESSORS)

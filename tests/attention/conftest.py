"""The implementations. Triton's kernel runs where there is a GPU, or in its interpreter:

TRITON_INTERPRET=1 pytest tests/attention
"""

import pytest

from tests.attention.cases import H100_PROCESSORS, needs_compiler, needs_triton
from vllm_sink.attention.cpu import CPUAttention, load
from vllm_sink.attention.interface import Attention
from vllm_sink.attention.reference import ReferenceAttention

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

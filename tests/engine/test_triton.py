"""The GPU backend in a real engine: here, on the CPU, its kernel runs in Triton's interpreter.

TRITON_INTERPRET=1 pytest tests/engine/test_triton.py
"""

from collections.abc import Iterator

import pytest
from vllm.platforms.cpu import CpuPlatform
from vllm.plugins import load_general_plugins
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from tests.attention.cases import H100_PROCESSORS, INTERPRETED

from .conftest import Checkpoint, Engine
from .streaming_llm import StreamingLlama
from .test_exact import TOLERANCE, error, generate, prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"),
]


@pytest.fixture
def gpu_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the place that the CPU platform takes its backend from."""
    load_general_plugins()
    monkeypatch.setattr(CpuPlatform, "num_compute_units", lambda _: H100_PROCESSORS)
    cpu = AttentionBackendEnum.CPU_ATTN
    ours = cpu.get_path()
    register_backend(cpu, AttentionBackendEnum.CUSTOM.get_path())
    selector._cached_get_attn_backend.cache_clear()
    yield
    register_backend(cpu, ours)
    selector._cached_get_attn_backend.cache_clear()


@pytest.mark.usefixtures("gpu_backend")
def test_streams_match_the_paper(checkpoint: Checkpoint, engine: Engine) -> None:
    """Chunks of prompts beside decode steps, then these alone: split, past the window."""
    path = checkpoint("llama3")
    sinks, window = 5, 91
    sink = {"sink_tokens": sinks, "window_tokens": window}
    with engine(path, sink, max_num_batched_tokens=40, max_num_seqs=3) as llm:
        outputs = generate(llm, prompts(150, 80, 11, seed=8), max_tokens=30)
    for output in outputs:
        assert error(output, StreamingLlama(path, sinks, window)) <= TOLERANCE

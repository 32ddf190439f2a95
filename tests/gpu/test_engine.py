"""vLLM's CUDA build, compiled and with CUDA graphs, on either of its model runners."""

import pytest

from tests.engine.conftest import Checkpoint, Engine
from tests.engine.streaming_llm import StreamingLlama
from tests.engine.test_exact import TOLERANCE, error, generate, prompts

platforms = pytest.importorskip("vllm.platforms")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not platforms.current_platform.is_cuda(), reason="vLLM has no CUDA device"),
]


@pytest.mark.parametrize("cudagraph_mode", ["FULL_AND_PIECEWISE", "FULL"])
@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize(("rope", "chunk"), [("default", 17), ("llama3", 512)])
def test_compiled_streams_match_the_paper(
    checkpoint: Checkpoint,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    rope: str,
    chunk: int,
    runner: str,
    cudagraph_mode: str,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if runner == "V2" else "0")
    path = checkpoint(rope)
    sinks, window = 5, 97
    sink = {"sink_tokens": sinks, "window_tokens": window}
    compiled = {
        "enforce_eager": False,
        "compilation_config": {"cudagraph_mode": cudagraph_mode},
        "max_num_batched_tokens": chunk,
        "max_num_seqs": 4,
    }
    with engine(path, sink, **compiled) as llm:
        outputs = generate(llm, prompts(313, 101, 204, 11, seed=chunk), max_tokens=130)
    for output in outputs:
        assert error(output, StreamingLlama(path, sinks, window)) <= TOLERANCE

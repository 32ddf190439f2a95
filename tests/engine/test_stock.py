"""Where nothing is evicted, vLLM's own numbers; where nothing is configured, vLLM's own classes."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import Llama3RotaryEmbedding
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from .conftest import Checkpoint, Engine
from .test_exact import generate, log_probs_of, prompts, tokens_of

pytestmark = pytest.mark.slow

SINK = {"sink_tokens": 5, "window_tokens": 91}
CACHE = 96
TOLERANCE = 1e-5
NEAR_INIT = {"initializer_range": 0.03}
CHUNKED = {"max_num_batched_tokens": 17, "max_model_len": 512}
WITHOUT_PLUGIN = """
import json, sys
from vllm import LLM
from tests.engine.test_stock import scores_of

llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
print("scores:", json.dumps(scores_of(llm)))
assert not [name for name in sys.modules if name.startswith("vllm_sink")]
"""


def scores_of(llm: Any) -> list[list[float]]:
    return [list(log_probs_of(output)) for output in generate(llm, prompts(60, 25, seed=1), 50)]


def test_unconfigured_is_stock(checkpoint: Checkpoint, engine: Engine) -> None:
    path = checkpoint("llama3", **NEAR_INIT)
    with engine(path, **CHUNKED) as llm:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        modules = list(runner.model.modules())
        coordinator = core.scheduler.kv_cache_manager.coordinator
        (group,) = (group for groups in runner.attn_groups for group in groups)
        implementations = {type(module.impl) for module in modules if isinstance(module, Attention)}
        rotaries = {type(m) for m in modules if "RotaryEmbedding" in type(m).__name__}
        assert implementations == {CPUAttentionBackendImpl}
        assert rotaries == {Llama3RotaryEmbedding}
        assert type(group.get_metadata_builder()) is CPUAttentionMetadataBuilder
        assert type(group.kv_cache_spec) is FullAttentionSpec
        assert [type(m) for m in coordinator.single_type_managers] == [FullAttentionManager]
        scores = scores_of(llm)
    arguments = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "block_size": 32,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
    }
    completed = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, str(path), json.dumps(arguments | CHUNKED)],
        env={**os.environ, "VLLM_PLUGINS": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (line,) = (line for line in completed.stdout.splitlines() if line.startswith("scores: "))
    assert scores == json.loads(line.removeprefix("scores: "))


@pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])
def test_short_streams_equal_stock(checkpoint: Checkpoint, engine: Engine, rope: str) -> None:
    """Prefill in chunks, decode, and prefix hits, up to exactly S + W tokens."""
    path = checkpoint(rope, **NEAR_INIT)
    texts = prompts(70, 33, 1, seed=2)
    caching = {"enable_prefix_caching": True, "max_num_batched_tokens": 17}
    with engine(path, SINK, **caching) as llm:
        outputs = [generate(llm, [text], CACHE - len(text), False)[0] for text in texts]
        hit = generate(llm, [tokens_of(outputs[0])[:65]], CACHE - 65, score_prompts=False)[0]
        outputs += [hit, *generate(llm, texts, max_tokens=5)]
    assert hit.num_cached_tokens == 64
    with engine(path, max_model_len=512) as llm:
        stock = generate(llm, [tokens_of(output) for output in outputs], max_tokens=1)
    for ours, theirs in zip(outputs, stock, strict=True):
        got = torch.tensor(list(log_probs_of(ours)), dtype=torch.float64)
        want = torch.tensor(list(log_probs_of(theirs))[:-1], dtype=torch.float64)[-len(got) :]
        assert float((got - want).abs().max()) <= TOLERANCE


def test_half_precision_is_near_float32(checkpoint: Checkpoint, engine: Engine) -> None:
    path = checkpoint(**NEAR_INIT)
    halves = []
    for dtype in ("float16", "bfloat16"):
        with engine(path, SINK, dtype=dtype, max_num_batched_tokens=64) as llm:
            halves += generate(llm, prompts(300, seed=3), max_tokens=40)
    with engine(path, SINK) as llm:
        singles = generate(llm, [tokens_of(half) for half in halves], max_tokens=1)
    for half, single, tolerance in zip(halves, singles, (0.02, 0.2), strict=True):
        pairs = zip(log_probs_of(half), log_probs_of(single), strict=False)
        assert max(abs(got - want) for got, want in pairs) <= tolerance


def test_compiled_equals_eager(checkpoint: Checkpoint, engine: Engine) -> None:
    path = checkpoint(**NEAR_INIT)
    with engine(path, SINK, enforce_eager=False, max_num_batched_tokens=64) as llm:
        (compiled,) = generate(llm, prompts(300, seed=3), max_tokens=40)
    with engine(path, SINK, max_num_batched_tokens=64) as llm:
        (eager,) = generate(llm, [tokens_of(compiled)], max_tokens=1)
    pairs = zip(log_probs_of(compiled), log_probs_of(eager), strict=False)
    assert max(abs(got - want) for got, want in pairs) <= 1e-4

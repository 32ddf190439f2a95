"""Every family the project names, in real vLLM: past its window and its trained context."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from .conftest import VOCABULARY, Engine
from .streaming_neox import StreamingNeoX
from .test_exact import generate, log_probs_of, prompts, tokens_of

pytestmark = pytest.mark.slow

SINKS, WINDOW = 5, 59
CACHE = SINKS + WINDOW
TRAINED = 128
STOCK_TOLERANCE = 1e-5
CHUNK_TOLERANCE = 1e-4

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": TRAINED,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 32 for i in range(16)],
    "long_factor": [1.0 + i for i in range(16)],
    "original_max_position_embeddings": TRAINED,
}
ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    window: int = WINDOW
    stock_length: int = TRAINED
    """`max_model_len` of the stock engine, by which vLLM chooses longrope's factors."""
    reference: bool = False

    def save(self, path: Path) -> Path:
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.model}Config")(**(SIZES | self.config))
        model = getattr(transformers, f"{self.model}ForCausalLM")(config).float()
        for name, weight in model.named_parameters():
            if "norm" not in name and name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.05)
        model.save_pretrained(path)
        return path


# Llama itself is what test_exact.py holds against the paper.
FAMILIES = {
    "mistral": Family("Mistral", {"sliding_window": None}),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", {"head_dim": 32}),
    "phi3-longrope-short": Family(
        "Phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 512}
    ),
    "phi3-longrope-long": Family(
        "Phi3",
        {"rope_parameters": LONGROPE, "max_position_embeddings": 512},
        window=150,
        stock_length=512,
    ),
    "gpt-neox": Family(
        "GPTNeoX",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
            "use_parallel_residual": True,
            "num_key_value_heads": 4,
        },
        reference=True,
    ),
    "falcon": Family("Falcon", FALCON),
    "falcon-alibi": Family(
        "Falcon", FALCON | {"alibi": True, "multi_query": False, "bias": True}, reference=True
    ),
    "gemma2-hybrid": Family(
        "Gemma2",
        {
            "layer_types": ALTERNATING,
            "sliding_window": 48,
            "head_dim": 32,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-hybrid": Family(
        "Qwen3",
        {
            "layer_types": ALTERNATING,
            "sliding_window": WINDOW,  # the same as ours
            "use_sliding_window": True,
            "max_window_layers": 2,
            "head_dim": 32,
        },
    ),
}


def log_probs(outputs: list[Any]) -> list[torch.Tensor]:
    return [torch.tensor(list(log_probs_of(output)), dtype=torch.float64) for output in outputs]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_streams(engine: Engine, tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    path = family.save(tmp_path / name)
    sink = {"sink_tokens": SINKS, "window_tokens": family.window}
    cache = SINKS + family.window

    with engine(path, sink, max_num_batched_tokens=17) as llm:
        outputs = generate(llm, prompts(3 * cache, cache - 20, seed=1), max_tokens=cache)
    streams, scored = [tokens_of(output) for output in outputs], log_probs(outputs)
    assert len(streams[0]) == 4 * cache > TRAINED
    assert all(part.isfinite().all() for part in scored)

    with engine(path, sink, max_num_batched_tokens=512) as llm:
        at_once = log_probs(generate(llm, streams, max_tokens=1))
    assert difference(scored, [part[:-1] for part in at_once]) <= CHUNK_TOLERANCE

    with engine(path, max_model_len=family.stock_length) as llm:
        stock = log_probs(generate(llm, [tokens[:cache] for tokens in streams], max_tokens=1))
    assert difference([part[: cache - 1] for part in scored], [p[:-1] for p in stock]) <= (
        STOCK_TOLERANCE
    )

    if family.reference:
        reference = StreamingNeoX(path, SINKS, family.window)
        want = [reference.log_probs(tokens) for tokens in streams]
        assert difference(scored, want) <= CHUNK_TOLERANCE


def test_a_hybrid_resumes_from_the_prefix_cache(engine: Engine, tmp_path: Path) -> None:
    """A hit past both windows is one that sliding and full layers agree on."""
    path = FAMILIES["gemma2-hybrid"].save(tmp_path / "hybrid")
    sink = {"sink_tokens": SINKS, "window_tokens": WINDOW}
    first, tail = prompts(300, 50, seed=2)
    with engine(path, sink, max_num_batched_tokens=64, enable_prefix_caching=True) as llm:
        (seen,) = generate(llm, [first], max_tokens=40, score_prompts=False)
        (again,) = generate(llm, [tokens_of(seen) + tail], max_tokens=40, score_prompts=False)
        whole = log_probs(generate(llm, [tokens_of(again)], max_tokens=1))[0][:-1]
    assert again.num_cached_tokens > CACHE
    (decoded,) = log_probs([again])
    assert difference([decoded], [whole[-len(decoded) :]]) <= CHUNK_TOLERANCE

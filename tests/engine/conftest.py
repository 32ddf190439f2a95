"""Tiny random checkpoints, and vLLM engines inside the test process."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

VOCABULARY = 128
TRAINED_CONTEXT = 512

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}

Checkpoint = Callable[..., Path]
Engine = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Save a random two-layer Llama: `checkpoint(rope="yarn", kv_heads=4)`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def save(rope: str = "default", kv_heads: int = 2, **config: Any) -> Path:
        name = "-".join([rope, str(kv_heads), *map(str, config.values())])
        path = tmp_path_factory.getbasetemp() / f"llama-{name}"
        if not path.exists():
            torch.manual_seed(0)
            arguments = {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": kv_heads,
                "head_dim": 32,
                "intermediate_size": 128,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": TRAINED_CONTEXT,
                "initializer_range": 0.15,
                "tie_word_embeddings": False,
                "rope_parameters": ROPE[rope],
            }
            LlamaForCausalLM(LlamaConfig(**(arguments | config))).float().save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def engine() -> Engine:
    """A `vllm.LLM` in this process, float32 and eager: `with engine(path, sink={...}) as llm`."""

    @contextmanager
    def start(path: Path, sink: dict[str, Any] | None = None, **arguments: Any) -> Iterator[Any]:
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform

        on_gpu = current_platform.is_cuda() and sink is not None and sink.get("policy") != "full"
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "block_size": 32,
            "max_model_len": 65536,
            "max_num_seqs": 8,
            "enable_prefix_caching": False,
            "additional_config": {} if sink is None else {"sink": sink},
            "attention_backend": "CUSTOM" if on_gpu else None,
        }
        llm = LLM(str(path), **(defaults | arguments))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()

    return start


def preempt_every(llm: Any, steps: int) -> Callable[[], int]:
    """Blocks run out for a running stream every so often, whatever there is of them.

    Of themselves, streams that were admitted do not preempt each other. Returns what counts them.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    allocate, preempt = scheduler.kv_cache_manager.allocate_slots, scheduler._preempt_request
    calls = {"allocations": 0, "preemptions": 0}

    def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
        calls["allocations"] += 1
        running = request in scheduler.running
        if running and len(scheduler.running) > 1 and calls["allocations"] % steps == 0:
            return None
        return allocate(request, *args, **kwargs)

    def preempt_request(*args: Any, **kwargs: Any) -> None:
        calls["preemptions"] += 1
        preempt(*args, **kwargs)

    scheduler.kv_cache_manager.allocate_slots = allocate_slots
    scheduler._preempt_request = preempt_request
    return lambda: calls["preemptions"]

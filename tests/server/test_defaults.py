"""What the server makes of flags, on a tiny checkpoint."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from vllm import AsyncEngineArgs
from vllm.v1.executor import ray_utils

from vllm_sink import embedded
from vllm_sink.serve import make_parser
from vllm_sink.server import defaults
from vllm_sink.server.defaults import PROMPT_TOKENS, fill_in
from vllm_sink.settings import SettingsError

from .conftest import CONTEXT

SINKS = 4


def completed(*flags: object) -> Namespace:
    args = make_parser().parse_args([str(flag) for flag in flags])
    fill_in(args)
    return args


def test_defaults(model: Path) -> None:
    args = completed("--model", model, "--max-num-seqs", 4)
    assert args.additional_config["sink"] == {
        "policy": "sink",
        "sink_tokens": SINKS,
        "window_tokens": CONTEXT - SINKS,
        "reindex": True,
        "compact_tokens": None,
    }
    assert args.max_model_len == PROMPT_TOKENS == 131_072
    assert args.kv_cache_memory_bytes > 0


def test_without_a_model_the_embedded_one_is_served() -> None:
    args = completed("--max-num-seqs", 4)
    assert args.model == args.model_tag == str(embedded.path())
    assert args.served_model_name == ["smollm2-135m-instruct"]
    assert args.additional_config["sink"]["window_tokens"] == 2048 - SINKS


def test_a_length_has_room_for_the_mark(model: Path) -> None:
    mark = 2 * PROMPT_TOKENS
    assert completed("--model", model, "--compact-tokens", mark).max_model_len == mark


def test_a_length_that_vllm_is_to_find_is_the_trained_one_at_most(model: Path) -> None:
    args = completed("--model", model, "--max-model-len", -1)
    assert args.max_model_len == -1
    assert args.additional_config["sink"]["window_tokens"] == CONTEXT // 2 - SINKS


def test_where_nothing_is_evicted_vllms_length_stays(model: Path) -> None:
    assert completed("--model", model, "--sink-policy", "full").max_model_len is None


def test_by_default_a_stream_is_not_compacted_all_the_time(model: Path) -> None:
    args = completed("--model", model, "--max-model-len", 200)
    assert args.additional_config["sink"]["window_tokens"] == 100 - SINKS


def test_flags_override_additional_config(model: Path) -> None:
    given = {"sink": {"sink_tokens": 8, "window_tokens": 32, "reindex": False}, "other": 1}
    flags = ["--model", model, "--additional-config", json.dumps(given), "--window-tokens", 64]
    args = completed(*flags, "--max-model-len", 2000)
    assert args.additional_config == {
        "sink": {
            "policy": "sink",
            "sink_tokens": 8,
            "window_tokens": 64,
            "reindex": False,
            "compact_tokens": None,
        },
        "other": 1,
    }
    assert args.max_model_len == 2000


@pytest.mark.parametrize(
    ("capability", "asked", "expected"),
    [
        ("AVX2", [], "float32"),
        ("AVX2", ["--dtype", "bfloat16"], "bfloat16"),
        ("AVX512", [], "auto"),
    ],
)
def test_no_bfloat16_on_a_cpu_that_is_slow_in_it(
    model: Path,
    capability: str,
    asked: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert completed("--model", model, *asked).dtype == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], "CUSTOM"),
        (["--sink-policy", "window"], "CUSTOM"),
        (["--sink-policy", "full"], None),
        (["--attention-backend", "FLASH_ATTN"], "FLASH_ATTN"),
        (["--attention-config", '{"backend": "FLASH_ATTN"}'], None),
        (["--attention-config", '{"backend_per_kind": {"full_attention": "CUSTOM"}}'], None),
        (
            ["--attention-config", '{"backend_per_kind": {"sliding_window": "FLASH_ATTN"}}'],
            "CUSTOM",
        ),
    ],
    ids=str,
)
def test_a_gpu_is_served_with_our_backend_unless_told(
    model: Path, asked: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completed("--model", model, *asked).attention_backend in (None, "FLASH_ATTN")
    monkeypatch.setattr(defaults, "current_platform", GPU)
    args = completed("--model", model, *asked)
    assert args.attention_backend == expected
    assert args.kv_cache_memory_bytes is None


GPU = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)


def test_window_policy_has_the_whole_cache(model: Path) -> None:
    args = completed("--model", model, "--sink-policy", "window")
    assert args.additional_config["sink"]["window_tokens"] == CONTEXT


@pytest.mark.parametrize("sink", [5, "abc", None, [1]], ids=repr)
def test_a_sink_entry_of_another_type_is_refused(model: Path, sink: Any) -> None:
    with pytest.raises(SettingsError, match=rf"^sink={re.escape(repr(sink))}: "):
        completed("--model", model, "--additional-config", json.dumps({"sink": sink}))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    """So many bytes are free."""
    memory = psutil.virtual_memory()._replace(available=16 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return int(memory.available)


PARALLEL = [
    ([], 1),
    (["-dp", 4], 4),
    (["-tp", 2, "-dp", 4], 8),
    (["-tp", 2, "-pp", 2], 4),
    (["-dp", 8, "--data-parallel-size-local", 2], 2),
    (["-dp", 4, "--data-parallel-size-local", 1, "-tp", 2], 2),
    (["-tp", 2, "-pp", 2, "--nnodes", 2, "--master-addr", "127.0.0.1"], 2),
]


@pytest.mark.parametrize(("flags", "ranks"), PARALLEL, ids=str)
def test_sizes_are_for_all_ranks_of_this_machine(
    model: Path, free: int, flags: list[object], ranks: int
) -> None:
    """A quarter of what is free for KV pools."""
    args = completed("--model", model, *flags)
    assert args.kv_cache_memory_bytes == free // (4 * ranks)


@pytest.mark.parametrize("flags", [[], ["-dp", 2]], ids=str)
def test_sizes_that_are_asked_for_are_a_ranks_own(
    model: Path, free: int, flags: list[object]
) -> None:
    sizes = ["--kv-cache-memory-bytes", 2**26, "--max-model-len", 1000]
    args = completed("--model", model, *sizes, *flags)
    assert args.kv_cache_memory_bytes == 2**26
    assert args.max_model_len == 1000


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-enable-chunked-prefill"],
        ["--no-enable-chunked-prefill", "--max-num-batched-tokens", 8192],
    ],
    ids=str,
)
def test_a_prompt_that_is_not_cut_keeps_vllms_length(model: Path, flags: list[object]) -> None:
    args = completed("--model", model, *flags)
    assert args.max_model_len is None
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert config.model_config.max_model_len == CONTEXT


def test_what_does_not_go_together_is_one_sentence(model: Path) -> None:
    flags = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", 128]
    with pytest.raises(SettingsError, match=r"^max_num_batched_tokens \(128\) is smaller than ."):
        completed("--model", model, *flags)


def test_answers_are_as_long_as_the_trained_context(model: Path) -> None:
    args = completed("--model", model, "--max-model-len", 1000)
    assert (args.default_max_tokens, args.trained_context) == (None, CONTEXT)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["-tp", 0], r"tensor_parallel_size=0: input should be greater than or equal to 1"),
        (["--block-size", 0], r"block_size=0: input should be greater than 0"),
        (["--max-model-len", -5], r"max_model_len=-5: input should be .*"),
        (["--additional-config", "5"], r"additional_config='5': accepted is a JSON object"),
        (["--additional-config", "[1]"], r"additional_config='\[1\]': accepted is a JSON object"),
        (["--attention-backend", "FOO"], r"Unknown attention backend: 'FOO'.*"),
        (["--tokenizer", "/nowhere"], r".*nowhere.*"),
    ],
    ids=str,
)
def test_what_vllm_refuses_is_one_line(model: Path, flags: list[object], sentence: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        completed("--model", model, *flags)
    assert re.fullmatch(sentence, str(refusal.value))


def test_ray_that_is_not_installed_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_utils, "ray", None)
    monkeypatch.setattr(ray_utils, "ray_import_err", "No module named 'ray'")
    flags = ["-tp", 2, "--distributed-executor-backend", "ray"]
    with pytest.raises(SettingsError, match=r"^Failed to import Ray: .* `pip install ray`\.$"):
        completed("--model", model, *flags)


def test_a_threshold_is_held_against_the_length_that_is_derived(model: Path) -> None:
    args = completed("--model", model, "--long-prefill-token-threshold", CONTEXT + 1)
    assert args.max_model_len > CONTEXT + 1


def test_no_length_past_the_trained_context_where_the_user_forbids_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0")
    assert completed("--model", model).max_model_len is None


def test_the_log_tells_of_what_is_served_alone(model: Path) -> None:
    """In a process of its own, where vLLM logs as it does for users."""
    code = f"""
from vllm import AsyncEngineArgs
from vllm_sink.serve import make_parser
from vllm_sink.server.defaults import fill_in
args = make_parser().parse_args(["--model={model}", "--max-num-batched-tokens=8192"])
fill_in(args)
print("filled in", flush=True)
AsyncEngineArgs.from_cli_args(args).create_engine_config()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    before, _, after = (done.stdout + done.stderr).partition("filled in")
    assert "Using max model len" in after, done.stderr
    assert "INFO" not in before
    assert "max_model_len" not in before

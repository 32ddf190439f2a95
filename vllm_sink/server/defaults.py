"""What the server fills in where the user is silent.

Sizes are shares of what this machine has free, for all ranks on it together. Whatever vLLM makes of
the user's other flags comes first, so vLLM is asked, once, for the engine that it would build.
"""

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import psutil
from pydantic import ValidationError
from vllm import AsyncEngineArgs, envs
from vllm.config import CacheConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_sink import cpu, embedded
from vllm_sink.plugin.check import full_attention_backend, trained_context
from vllm_sink.plugin.refusal import one_line
from vllm_sink.settings import SettingsError, SinkSettings, sentence_of

CACHE_TOKENS = 2048
"""S + W by default, where the model's trained context is no smaller."""
PROMPT_TOKENS = 2**17
"""A prompt's longest by default, where the model's trained context is no longer. vLLM keeps a row
of so many token ids for every stream (vllm/v1/worker/gpu_input_batch.py, gpu/states.py)."""
CPU_KV_SHARE = 4
"""On a CPU, whose memory is not the server's alone, the KV pool is one part in so many of what is
free."""


def fill_in(args: Namespace) -> None:
    """Complete `args` of the server in place; raises `SettingsError`, one sentence."""
    args.model = args.model_tag or args.model
    if args.model is None:
        model = embedded.path()
        args.model = str(model)
        args.served_model_name = args.served_model_name or [model.name]
    args.model_tag = args.model
    if current_platform.is_cpu() and args.dtype == "auto" and cpu.fast_dtype() == "float32":
        args.dtype = "float32"
    stock = stock_config(args)
    context, ranks = trained_context(stock.model_config), ranks_here(stock)
    args.trained_context = context
    # Without chunks a prompt has to fit in one step: there vLLM's own length stays.
    chunked = stock.scheduler_config.enable_chunked_prefill
    free_length = args.max_model_len is None and envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN and chunked
    length = stock.model_config.max_model_len
    longest = max(PROMPT_TOKENS, context) if free_length else length
    settings = settings_from(args, context, longest)
    if free_length and settings.evicts:
        args.max_model_len = max(longest, settings.compact_tokens or 0)
    args.additional_config = {**args.additional_config, "sink": settings.model_dump()}
    chosen = args.attention_backend or full_attention_backend(args.attention_config)
    if current_platform.is_cuda() and settings.evicts and not chosen:
        args.attention_backend = AttentionBackendEnum.CUSTOM.name
    asked = args.kv_cache_memory_bytes is not None or (
        # By identity, since the user may ask for what is the default.
        args.gpu_memory_utilization is not CacheConfig.gpu_memory_utilization
    )
    if current_platform.is_cpu() and not asked:
        free = psutil.virtual_memory().available
        args.kv_cache_memory_bytes = free // (CPU_KV_SHARE * ranks)


def stock_config(args: Namespace) -> VllmConfig:
    """The engine that vLLM would build of the user's flags, without sinks."""
    if not isinstance(args.additional_config, dict):
        raise SettingsError(
            f"additional_config={args.additional_config!r}: accepted is a JSON object"
        )
    plain = deepcopy(args)
    plain.additional_config.pop("sink", None)
    if plain.max_model_len is None and envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN and may_cut(plain):
        # As long as it may come to be: nothing is to be held against a shorter length.
        plain.max_model_len = PROMPT_TOKENS
    try:
        with without_information():
            engine_args = AsyncEngineArgs.from_cli_args(plain)
            return engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER, args.headless)
    except ValidationError as error:
        raise SettingsError(sentence_of(error)) from error
    except (OSError, ValueError) as error:
        raise SettingsError(one_line(error)) from error


def may_cut(args: Namespace) -> bool:
    """Whether prompts may be computed in chunks, as far as flags alone tell."""
    return args.enable_chunked_prefill is not False and args.runner != "pooling"


@contextmanager
def without_information() -> Iterator[None]:
    """Leave lines of information out of the log: they are not of what is served.

    Handlers are no place for it, since vLLM makes them anew on the way.
    """
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def ranks_here(vllm_config: VllmConfig) -> int:
    """Worker processes on this machine, of all parallel kinds together."""
    parallel = vllm_config.parallel_config
    return parallel.local_world_size * max(1, parallel.data_parallel_size_local)


def settings_from(args: Namespace, context: int, longest: int) -> SinkSettings:
    """Flags over `--additional-config` over defaults.

    `context` is the trained one, in tokens, `longest` what there is room for of a stream: by
    default twice S + W at least, so that it is not compacted all the time.
    """
    flags = {
        "policy": args.sink_policy,
        "sink_tokens": args.sink_tokens,
        "window_tokens": args.window_tokens,
        "compact_tokens": args.compact_tokens,
    }
    given = args.additional_config.get("sink", {})
    if isinstance(given, dict):
        given = given | {key: value for key, value in flags.items() if value is not None}
        if "window_tokens" not in given:
            given["window_tokens"] = default_window(given, min(context, longest // 2))
    return SinkSettings.parse(given)


def default_window(given: dict[str, Any], longest: int) -> int:
    """W, such that S + W is the default, or `longest` where that is less."""
    sinks = SinkSettings.parse(given | {"compact_tokens": None}).sinks
    cache = min(CACHE_TOKENS, longest)
    if sinks >= cache:
        raise SettingsError(
            f"sink.sink_tokens={sinks}: accepted below {cache}, the default of "
            "sink_tokens + window_tokens; set window_tokens for more"
        )
    return cache - sinks

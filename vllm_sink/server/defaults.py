"""What the server fills in where the user is silent.

Sizes are shares of what this machine has free, for all ranks on it together. Whatever vLLM makes of
the user's other flags comes first, so vLLM is asked, once, for the engine that it would build.
"""

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

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
STREAM_CAPACITY = 4 * 2**20
"""Tokens a stream may grow to by default."""
BYTES_A_STREAM_TOKEN = 5
"""vLLM's model runners keep a token id for every position of every stream, and V1 a flag beside it
(vllm/v1/worker/gpu_input_batch.py, vllm/v1/worker/gpu/states.py)."""
ROWS_SHARE = 8
"""Those rows may take one part in so many of the free memory."""
BYTES_A_STREAM_BLOCK = 8
"""On a GPU vLLM keeps two block tables (vllm/v1/worker/gpu/block_table.py), ..."""
TABLES_SHARE = 64
"""... out of what `gpu_memory_utilization` leaves: one part in so many of the GPU's memory."""
CPU_KV_SHARE = 4
"""On a CPU, whose memory is not the server's alone, so may the KV pool."""


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
    settings = settings_from(args, context)
    args.additional_config = {**args.additional_config, "sink": settings.model_dump()}
    chosen = args.attention_backend or full_attention_backend(args.attention_config)
    if current_platform.is_cuda() and settings.evicts and not chosen:
        args.attention_backend = AttentionBackendEnum.CUSTOM.name
    # Without chunks a prompt has to fit in one step: there vLLM's own length stays.
    chunked = stock.scheduler_config.enable_chunked_prefill
    free_length = args.max_model_len is None and envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN
    if free_length and settings.evicts and chunked:
        capacity = stream_capacity(stock.scheduler_config.max_num_seqs, ranks, args.block_size)
        args.max_model_len = max(capacity, context)
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
        plain.max_model_len = STREAM_CAPACITY
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


def settings_from(args: Namespace, context: int) -> SinkSettings:
    """Flags over `--additional-config` over defaults; `context` is the trained one, in tokens."""
    flags = {
        "policy": args.sink_policy,
        "sink_tokens": args.sink_tokens,
        "window_tokens": args.window_tokens,
    }
    given = args.additional_config.get("sink", {})
    SinkSettings.parse(given)
    given = given | {key: value for key, value in flags.items() if value is not None}
    if "window_tokens" in given:
        return SinkSettings.parse(given)
    cache, sinks = min(CACHE_TOKENS, context), SinkSettings.parse(given).sinks
    if sinks >= cache:
        raise SettingsError(
            f"sink.sink_tokens={sinks}: accepted below {cache}, the default of "
            "sink_tokens + window_tokens; set window_tokens for more"
        )
    return SinkSettings.parse(given | {"window_tokens": cache - sinks})


def stream_capacity(streams: int, ranks: int, block_size: int | None) -> int:
    """`STREAM_CAPACITY` tokens, or what the rows and tables of `streams` a rank leave of memory."""
    rows = psutil.virtual_memory().available // (ROWS_SHARE * ranks)
    capacity = min(STREAM_CAPACITY, rows // (BYTES_A_STREAM_TOKEN * streams))
    if current_platform.is_cuda():
        tables = current_platform.get_device_total_memory() // TABLES_SHARE
        block_size = block_size or CacheConfig.DEFAULT_BLOCK_SIZE
        capacity = min(capacity, tables // (BYTES_A_STREAM_BLOCK * streams) * block_size)
    return capacity

"""`python -m vllm_sink.serve`: vLLM's OpenAI-compatible server, with streams that never end.

Takes every flag of `vllm serve` (vllm/entrypoints/cli/serve.py) and three of its own.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import get_args

import psutil
from vllm import AsyncEngineArgs
from vllm.config import CacheConfig, ModelConfig
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_sink import cpu, embedded
from vllm_sink.plugin.check import full_attention_backend, trained_context
from vllm_sink.settings import Policy, SettingsError, SinkSettings

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ModuleNotFoundError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

PROGRAM = "python -m vllm_sink.serve"
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted; exit with status 2 and one sentence on settings that cannot work."""
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    # As `vllm serve` sets it: `fork` does not go with some accelerators.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        fill_in_defaults(args)
        ServeSubcommand().validate(args)
        ServeSubcommand.cmd(args)
    except (SettingsError, embedded.EmbeddedModelError) as error:
        parser.exit(2, f"{PROGRAM}: error: {error}\n")


def make_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--model MODEL] [options]",
        description="Serve a model with attention sinks and a rolling window: streams of any "
        "length, in bounded memory. Without --model it serves a small embedded one.",
        epilog="--help=all lists every flag, --help=GROUP those of a group.",
    )
    sinks = parser.add_argument_group("Sinks", "Which tokens a stream keeps.")
    sinks.add_argument("--sink-tokens", type=int, help="S, first tokens kept for ever (default 4)")
    sinks.add_argument(
        "--window-tokens",
        type=int,
        help="W, most recent tokens kept (default: S + W is the smaller of "
        f"{CACHE_TOKENS} and the model's trained context)",
    )
    sinks.add_argument(
        "--sink-policy",
        choices=get_args(Policy),
        help="sink: first tokens and window (default); window: window alone; "
        "full: nothing is evicted",
    )
    parser = make_arg_parser(parser)
    parser.set_defaults(model=None)
    return parser


def fill_in_defaults(args: Namespace) -> None:
    """Complete `args` in place: model, sinks, capacity, dtype, attention backend, KV pool."""
    args.model = args.model_tag or args.model
    if args.model is None:
        model = embedded.path()
        args.model = str(model)
        args.served_model_name = args.served_model_name or [model.name]
    args.model_tag = args.model
    if current_platform.is_cpu() and args.dtype == "auto" and cpu.fast_dtype() == "float32":
        args.dtype = "float32"
    model_config = AsyncEngineArgs.from_cli_args(args).create_model_config()
    settings = settings_from(args, model_config)
    args.additional_config = {**args.additional_config, "sink": settings.model_dump()}
    chosen = args.attention_backend or full_attention_backend(args.attention_config)
    if current_platform.is_cuda() and settings.evicts and not chosen:
        args.attention_backend = AttentionBackendEnum.CUSTOM.name
    if args.max_model_len is None and settings.evicts:
        args.max_model_len = stream_capacity(args, model_config)
    asked = args.kv_cache_memory_bytes is not None or (
        args.gpu_memory_utilization != CacheConfig.gpu_memory_utilization
    )
    if current_platform.is_cpu() and not asked:
        args.kv_cache_memory_bytes = psutil.virtual_memory().available // CPU_KV_SHARE


def settings_from(args: Namespace, model_config: ModelConfig) -> SinkSettings:
    """Flags over `--additional-config` over defaults; raises `SettingsError`."""
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
    cache, sinks = min(CACHE_TOKENS, trained_context(model_config)), SinkSettings.parse(given).sinks
    if sinks >= cache:
        raise SettingsError(
            f"sink.sink_tokens={sinks}: accepted below {cache}, the default of "
            "sink_tokens + window_tokens; set window_tokens for more"
        )
    return SinkSettings.parse(given | {"window_tokens": cache - sinks})


def stream_capacity(args: Namespace, model_config: ModelConfig) -> int:
    """`STREAM_CAPACITY`, or what the rows and tables of `max_num_seqs` streams leave of memory."""
    streams = args.max_num_seqs
    if streams is None:
        _, defaults = AsyncEngineArgs.get_batch_defaults(world_size=1)
        streams = defaults[UsageContext.OPENAI_API_SERVER]
    rows = psutil.virtual_memory().available // ROWS_SHARE
    capacity = min(STREAM_CAPACITY, rows // (BYTES_A_STREAM_TOKEN * streams))
    if current_platform.is_cuda():
        tables = current_platform.get_device_total_memory() // TABLES_SHARE
        block_size = args.block_size or CacheConfig.DEFAULT_BLOCK_SIZE
        capacity = min(capacity, tables // (BYTES_A_STREAM_BLOCK * streams) * block_size)
    return max(capacity, trained_context(model_config))


if __name__ == "__main__":
    main()

"""`python -m vllm_sink.serve`: vLLM's OpenAI-compatible server, with streams that never end.

Takes every flag of `vllm serve` (vllm/entrypoints/cli/serve.py) and some of its own.
"""

import gc
import logging
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import get_args

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_sink import embedded
from vllm_sink.plugin import presence
from vllm_sink.plugin.refusal import passed_on
from vllm_sink.server import answers, sessions
from vllm_sink.server.defaults import CACHE_TOKENS, fill_in
from vllm_sink.settings import MARK, Policy, SettingsError

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ModuleNotFoundError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

PROGRAM = "python -m vllm_sink.serve"
ENVIRONMENT = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    # As `vllm serve` sets it: `fork` does not go with some accelerators.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""Of all processes, where the user does not say otherwise."""


def is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Drop vLLM's warning that positions past the trained context give NaN: here they do not."""
    return "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in record.getMessage()


# Not in `main`: the processes of several API servers, which build configs too, import this module.
logging.getLogger("vllm.config.model").addFilter(is_no_false_alarm)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted; exit with status 2 and one sentence on settings that cannot work."""
    os.environ |= ENVIRONMENT | os.environ
    # After a failed start Python's tracker cleans up behind vLLM, and would have the last word.
    ignored = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, ignored))
    refusal = None
    try:
        with passed_on():
            args = completed(arguments)
            sessions.prepare(args)
            ServeSubcommand().validate(args)
            ServeSubcommand.cmd(args)
    except (SettingsError, embedded.EmbeddedModelError) as error:
        refusal = str(error)
    if refusal:
        # Before the last word, not after it: processes of vLLM's that end with their owners.
        logging.disable()
        gc.collect()
        print(f"{PROGRAM}: error: {refusal}", file=sys.stderr)
        sys.exit(2)


def completed(arguments: Sequence[str] | None) -> Namespace:
    """What the server goes by, on this machine; raises `SettingsError`, one sentence."""
    presence.require()
    args = make_parser().parse_args(arguments)
    fill_in(args)
    return args


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
        help=f"W, most recent tokens kept (default: S + W is the smallest of {CACHE_TOKENS}, the "
        "model's trained context and half of --max-model-len)",
    )
    sinks.add_argument(
        "--compact-tokens",
        type=int,
        help="the mark: tokens held of a stream at which it goes on from its S first and W last, "
        f"read anew (default: the smaller of {MARK} (S + W) and --max-model-len)",
    )
    sinks.add_argument(
        "--sink-policy",
        choices=get_args(Policy),
        help="sink: first tokens and window (default); window: window alone; "
        "full: nothing is evicted",
    )
    sinks.add_argument(
        "--default-max-tokens",
        type=natural,
        help="tokens of an answer whose request names no limit (default: the model's own "
        "max_new_tokens, or as many as its trained context; 0: no end)",
    )
    add_session_flags(parser)
    parser = make_arg_parser(parser)
    parser.set_defaults(model=None)
    parser.set_defaults(middleware=[answers.NAME])
    parser.set_defaults(enable_prompt_tokens_details=True)
    return parser


def add_session_flags(parser: FlexibleArgumentParser) -> None:
    group = parser.add_argument_group("Sessions", "Conversations that the server keeps.")
    group.add_argument(
        "--session-store",
        help="sqlite:PATH, redis://..., rediss://..., unix://..., or none: no sessions (default: "
        "sqlite, in a folder of the user's)",
    )
    group.add_argument(
        "--session-ttl", type=positive, help="seconds without a turn, after which one is deleted"
    )
    group.add_argument("--session-limit", type=positive, help="sessions of an API key")
    group.add_argument(
        "--session-bytes-limit", type=positive, help="stored for the sessions of an API key"
    )
    group.add_argument(
        "--session-turn-limit",
        type=positive,
        help="tokens that a turn reads and generates (default 131072)",
        default=2**17,
    )
    group.add_argument(
        "--session-turns-limit",
        type=positive,
        help="turns under way at once in an API server, waiting ones included",
    )
    group.add_argument(
        "--session-isolation",
        action="store_true",
        help="sessions of different API keys share nothing in the prefix cache",
    )


def natural(text: str) -> int:
    """An argument's type: an integer that is not negative."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text}: accepted is an integer from 0 on")
    return int(text)


def positive(text: str) -> int:
    """An argument's type: an integer above 0."""
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"{text}: accepted is an integer from 1 on")
    return int(text)


if __name__ == "__main__":
    main()

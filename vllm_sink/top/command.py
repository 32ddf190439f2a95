"""`python -m vllm_sink.top URL`: streams, sessions and memory of a server, as they are now.

Where it does not write to a terminal it prints them once, after one interval, as with --once.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import httpx
from rich.console import Console
from rich.live import Live

from vllm_sink.top.readings import Interval, NoMetricsError, base, read
from vllm_sink.top.view import view

PROGRAM = "python -m vllm_sink.top"
PATIENCE = 5.0
"""Seconds without an answer after which there is none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2 and one sentence where there are no metrics to begin with."""
    options = parse(arguments)
    show = watch if sys.stdout.isatty() and not options.once else print_once
    try:
        with httpx.Client(timeout=PATIENCE) as client:
            show(client, base(options.url), options.interval)
    except NoMetricsError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("url", metavar="URL", help="of the server, as http://127.0.0.1:8000")
    parser.add_argument(
        "--interval", type=seconds, default=1.0, help="seconds between readings (%(default)g)"
    )
    parser.add_argument("--once", action="store_true", help="print once, in a terminal too")
    return parser.parse_args(arguments)


def seconds(text: str) -> float:
    """An argument's type: what a view can be refreshed in."""
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: accepted are seconds from 0.1 to 3600")
    return value


def print_once(client: httpx.Client, url: str, interval: float) -> None:
    """Raises `NoMetricsError`."""
    before = read(client, url)
    time.sleep(interval)
    Console().print(view(url, Interval(before, read(client, url))))


def watch(client: httpx.Client, url: str, interval: float) -> None:
    """Until interrupted; raises `NoMetricsError` if the first reading fails, and goes on later."""
    before = now = read(client, url)
    with Live(view(url, Interval(before, now)), screen=True, auto_refresh=False) as live:
        live.refresh()
        while True:
            time.sleep(interval)
            failure = ""
            try:
                before, now = now, read(client, url)
            except NoMetricsError as error:
                failure = str(error)
            live.update(view(url, Interval(before, now), failure), refresh=True)

"""One request to a real server that goes on for millions of tokens, watched from outside.

Its run may be broken off: what a stream is, its buffer is, so another server goes on from there.
At its end it takes turns with a stream of another server that is near its beginning, so that what
else the machine does meets both.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.harness import results, servers, tiny
from benchmarks.harness.cli import BenchmarkError
from benchmarks.harness.servers import Target
from vllm_sink.buffer import Buffer

SERVED = {
    "served-model-name": "tiny",
    "sink-tokens": 4,
    "window-tokens": 508,
    "compact-tokens": 8192,
    "max-num-seqs": 1,
    # The model in the engine's process: their exchange takes longer than such a model.
    "distributed-executor-backend": "uni",
    "kv-cache-memory-bytes": 2**26,
}
LAYERS = {"num_hidden_layers": 1}
BUFFER = Buffer(4, 508, 8192)
PROMPT = 20
EVERY = 25_000
"""Tokens between two samples."""
SETTLED = 100_000
"""From so many tokens of a server on, it is to stay as it is."""
STRETCH = 10
"""Samples that are compared, at each end."""
TURNS = 40
"""Of each of the two streams, at the end."""
TURN = 2_500
"""Tokens of a turn that are timed ..."""
LEAD = 100
"""... after so many, some of which lay ready."""
CLOCKS: dict[str, Callable[[dict[str, Any]], float]] = {
    "wall": lambda sample: sample["seconds"],
    "engine_cpu": lambda sample: sample["engine"]["cpu_s"],
    "front_end_cpu": lambda sample: sample["front_end"]["cpu_s"],
}
"""Seconds up to a sample. What else the machine does is in the first, hardly in the others."""
VARIABLES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""What `uni` takes on a CPU; a server has processes of its own all the same."""
MIB = 2**20


@dataclass(frozen=True)
class Use:
    """Of some of the server's processes, since they were started."""

    cpu_s: float
    rss_mib: float

    @classmethod
    def of(cls, processes: list[psutil.Process]) -> "Use":
        times = [process.cpu_times() for process in processes]
        memory = sum(process.memory_info().rss for process in processes)
        return cls(round(sum(t.user + t.system for t in times), 2), round(memory / MIB, 2))


@dataclass(frozen=True)
class Sample:
    position: int
    """Tokens of the stream."""
    seconds: float
    """Since this server's first token."""
    engine: Use
    front_end: Use
    kv_blocks: int


@dataclass
class Stream:
    """As far as it has come, and what there is of it."""

    position: int
    tokens: list[int]

    def take(self, tokens: list[int]) -> None:
        self.position += len(tokens)
        self.tokens = BUFFER.extended(self.tokens, tokens)


def follow(target: Target, stream: Stream, until: int) -> Iterator[None]:
    """Read the stream, and come back after each event, until position `until`.

    Raises:
        BenchmarkError: it breaks off.
    """
    body = {
        "model": target.model,
        "prompt": stream.tokens,
        "max_tokens": until - stream.position,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    url = f"{target.url}/v1/completions"
    try:
        with httpx.stream("POST", url, json=body, timeout=None) as response:
            if response.is_error:
                raise BenchmarkError(f"The server refuses it: {response.read().decode()}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise BenchmarkError(f"The stream broke off: {event['error']['message']}")
                stream.take(event["choices"][0]["token_ids"] or [])
                yield
    except httpx.HTTPError as error:
        raise BenchmarkError(f"The server at {target.url} was lost: {error}.") from error


@dataclass
class Runner:
    """A server and its one stream, which goes on while it is read."""

    target: Target
    stream: Stream
    until: int

    def __post_init__(self) -> None:
        self.engine = self.process.children(recursive=True)
        self.events = follow(self.target, self.stream, self.until)
        self.start: float | None = None

    @property
    def process(self) -> psutil.Process:
        assert self.target.process is not None
        return self.target.process

    def read(self, position: int) -> Sample:
        while self.stream.position < position:
            next(self.events)
            self.start = self.start or time.monotonic()
        seconds = round(time.monotonic() - (self.start or 0), 3)
        uses = (Use.of(self.engine), Use.of([self.process]))
        return Sample(self.stream.position, seconds, *uses, self.target.kv_blocks())

    def turn(self) -> dict[str, float]:
        """Milliseconds a token, on each clock."""
        first = self.read(self.stream.position + LEAD)
        last = self.read(first.position + TURN)
        tokens = last.position - first.position
        return {
            name: 1000 * (clock(asdict(last)) - clock(asdict(first))) / tokens
            for name, clock in CLOCKS.items()
        }

    def suspend(self) -> None:
        for process in (self.process, *self.engine):
            process.suspend()

    def resume(self) -> None:
        for process in (self.process, *self.engine):
            process.resume()


def run(path: Path, until: int, fresh: bool, console: Console) -> None:
    """Go on with the stream in `path`, or begin one; what comes of it is written as it comes."""
    setup = {"model": tiny.MODEL | LAYERS, "seed": tiny.SEED, "served": SERVED, "every": EVERY}
    record = {} if fresh or not path.exists() else json.loads(path.read_text("utf-8"))
    if record.get("setup") != setup:
        prompt = tiny.tokens(PROMPT)
        record = {"setup": setup, "segments": [], "position": PROMPT, "tokens": prompt}
    stream = Stream(record["position"], record["tokens"])
    samples: list[dict[str, Any]] = []
    segments = [*record["segments"], samples]
    turns: dict[str, Any] | None = record.get("turns")

    def sampled(sample: Sample) -> None:
        samples.append(asdict(sample))
        progress.update(task, completed=sample.position)
        write()

    def write() -> None:
        state = {"position": stream.position, "tokens": stream.tokens, "segments": segments}
        figures = {"setup": setup, "servers": summary(segments), "turns": turns, **state}
        results.write(path, "benchmarks.position", figures, None)

    if stream.position < until:
        with (
            tiny.llama(speaks=True, **LAYERS) as model,
            server(model) as target,
            Progress(console=console) as progress,
        ):
            task = progress.add_task("tokens", total=until, completed=stream.position)
            far = Runner(target, stream, until + TURNS * (LEAD + TURN) + EVERY)
            while stream.position < until:
                sampled(far.read(min(until, stream.position // EVERY * EVERY + EVERY)))
            far.suspend()
            try:
                with server(model) as other:
                    turns = take_turns(far, other, progress)
            finally:
                far.resume()
            write()
    show(summary(segments), console)


def take_turns(far: Runner, other: Target, progress: Progress) -> dict[str, Any]:
    """Of a suspended server, whose stream has come far, and of another, once it has settled: the
    time a token on each clock, and the ratios of turns side by side."""
    position = far.stream.position
    stream = Stream(PROMPT, tiny.tokens(PROMPT))
    near = Runner(other, stream, SETTLED + TURNS * (LEAD + TURN) + EVERY)
    task = progress.add_task("settling", total=SETTLED)
    while stream.position < SETTLED:
        near.read(min(SETTLED, stream.position + EVERY))
        progress.update(task, completed=stream.position)
    near.suspend()
    turns: dict[str, list[dict[str, float]]] = {"near": [], "far": []}
    task = progress.add_task("taking turns", total=TURNS)
    for _ in range(TURNS):
        for name, runner in (("near", near), ("far", far)):
            runner.resume()
            turns[name].append(runner.turn())
            runner.suspend()
        progress.advance(task)
    near.resume()
    clocks = {}
    for clock in CLOCKS:
        taken = {name: [turn[clock] for turn in turns[name]] for name in turns}
        ratios = [b / a for a, b in zip(taken["near"], taken["far"], strict=True)]
        spreads = {f"{name}_ms": results.spread(values) for name, values in taken.items()}
        clocks[clock] = {**spreads, "ratio": results.spread(ratios)}
    return {"near": SETTLED, "far": position, **clocks}


def server(model: str) -> AbstractContextManager[Target]:
    return servers.started(lambda port: command(model, port), VARIABLES)


def command(model: str, port: int) -> list[str]:
    own = {"model": model, "host": "127.0.0.1", "port": port}
    return [*servers.OURS, "--enforce-eager", *servers.flags(SERVED | own)]


def summary(segments: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each server that went on long enough, once it had settled: its time at the end over that
    at the beginning, and by how much its memory grew."""
    rows = []
    for samples in segments:
        steady = samples[SETTLED // EVERY :]
        if len(steady) <= 2 * STRETCH:
            continue
        row: dict[str, Any] = {"from": steady[0]["position"], "to": steady[-1]["position"]}
        for name, clock in CLOCKS.items():
            taken = [1000 * (clock(b) - clock(a)) / EVERY for a, b in pairwise(steady)]
            first, last = median(taken[:STRETCH]), median(taken[-STRETCH:])
            row[name] = {"first_ms": round(first, 4), "last_ms": round(last, 4)}
            row[name]["ratio"] = round(last / first, 4)
        for name in ("engine", "front_end"):
            grown = steady[-1][name]["rss_mib"] - steady[0][name]["rss_mib"]
            row[f"{name}_grown_mib"] = round(grown, 2)
        row["kv_blocks"] = max(sample["kv_blocks"] for sample in steady)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("tokens", *(f"{name}: ms a token, ratio" for name in CLOCKS), "grown, MiB")
    for row in rows:
        times = (f"{row[name]['last_ms']:.3f}, {row[name]['ratio']:.3f}" for name in CLOCKS)
        grown = f"{row['engine_grown_mib']}, {row['front_end_grown_mib']}"
        table.add_row(f"{row['from']:,} to {row['to']:,}", *times, grown)
    console.print(table)

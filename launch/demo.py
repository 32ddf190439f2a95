"""`make demo`: streams that never end in a KV cache that does not grow, and a durable conversation.

Starts the server on the embedded model, lets several clients stream from it at once, past window
and `max_model_len`, and shows how far each has come and how many KV blocks they hold. Then kills it
in the middle of a conversation, goes on with that on another one, and stops it, however it ends.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from openai import AsyncOpenAI, OpenAIError
from openai.types.chat import ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from launch.book import book
from launch.conversation import ASKED, READ, TOLD, Conversation
from launch.server import REFRESH_SECONDS, Server, ServerLostError, free_port, serving
from vllm_sink import embedded
from vllm_sink.geometry import Geometry, cdiv

SINK_TOKENS = 4
MODEL = "smollm2-135m-instruct"
INSTRUCTION = (
    "Here is a passage from Newton's Opticks. Explain it to a student, at great length.\n\n"
)
PASSAGE_CHARACTERS = 1200
LONGEST_PROMPT = 512
"""In tokens: more than a passage and the chat template around it ever take."""
LINE_SECONDS = 5
PASSAGES_READ = 3
"""In the conversation: more than its window."""

console = Console()


@dataclass
class Stream:
    """One client's stream, counted in tokens from the first of its prompt."""

    name: str
    messages: list[ChatCompletionMessageParam]
    prompt_tokens: int = 0
    position: int = 0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    text: str = ""

    def advance(self, position: int, text: str) -> None:
        self.position = position
        self.text += text
        self.last_token_at = time.monotonic()
        self.first_token_at = self.first_token_at or self.last_token_at

    @property
    def generated(self) -> int:
        return max(0, self.position - self.prompt_tokens)

    @property
    def tokens_per_second(self) -> float:
        seconds = self.last_token_at - self.first_token_at
        return (self.generated - 1) / seconds if seconds else 0.0


@dataclass(frozen=True)
class CacheUse:
    """What vLLM's Prometheus metrics say of the KV cache (vllm/v1/metrics/loggers.py)."""

    block_size: int
    blocks: float
    streams: int
    compactions: int

    @classmethod
    def parse(cls, metrics: str) -> "CacheUse":
        samples = {
            sample.name: sample
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
        }
        config = samples["vllm:cache_config_info"].labels
        # The usage leaves out the null block (vllm/v1/core/block_pool.py, get_usage).
        usable_blocks = int(config["num_gpu_blocks"]) - 1
        return cls(
            block_size=int(config["block_size"]),
            blocks=samples["vllm:kv_cache_usage_perc"].value * usable_blocks,
            streams=int(samples["vllm:num_requests_running"].value),
            compactions=int(samples["vllm_sink:compactions_total"].value),
        )

    @property
    def blocks_a_stream(self) -> float:
        return self.blocks / self.streams if self.streams else 0.0


@dataclass
class Run:
    """All streams of a demo, and the KV blocks that they were seen to hold."""

    streams: list[Stream]
    geometry: Geometry
    tokens: int
    max_model_len: int
    block_size: int = 0
    compactions: int = 0
    blocks_a_stream: float = 0.0
    most_blocks_a_stream: float = 0.0
    started_at: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> bool:
        return all(stream.position >= self.tokens for stream in self.streams)

    def see(self, use: CacheUse) -> None:
        """Note a sample, once all prompts are read: until then a stream may hold more blocks."""
        self.compactions = use.compactions
        if use.streams and all(stream.position for stream in self.streams):
            self.block_size = use.block_size
            self.blocks_a_stream = use.blocks_a_stream
            self.most_blocks_a_stream = max(self.most_blocks_a_stream, use.blocks_a_stream)

    def table(self) -> Table:
        words_width = max(20, console.width - 69)
        table = Table(caption=self.blocks_line(), caption_justify="left")
        for heading in ("client", "position", "windows", "lengths", "generated", "tokens/s"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("last words", justify="right", no_wrap=True)
        for stream in self.streams:
            table.add_row(
                stream.name,
                f"{stream.position:,}",
                f"{stream.position / self.geometry.window:.1f}",
                f"{stream.position / self.max_model_len:.1f}",
                f"{stream.generated:,}",
                f"{stream.tokens_per_second:.1f}",
                escape(" ".join(stream.text[-200:].split())[-words_width:]),
            )
        return table

    def line(self) -> str:
        generated = sum(stream.generated for stream in self.streams)
        positions = ", ".join(f"{stream.position:,}" for stream in self.streams)
        seconds = time.monotonic() - self.started_at
        return (
            f"{seconds:.0f} s: positions {positions} of {self.tokens:,}; "
            f"{generated:,} tokens generated; {self.blocks_line()}"
        )

    def blocks_line(self) -> str:
        if not self.block_size:
            return "reading prompts"
        position = max(stream.position for stream in self.streams)
        return (
            f"KV blocks of {self.block_size} tokens a stream, on average: "
            f"{self.blocks_a_stream:.1f} now, {self.most_blocks_a_stream:.1f} at most; "
            f"bound {self.geometry.max_blocks(self.block_size)}; "
            f"without eviction {cdiv(position, self.block_size)}; "
            f"max_model_len {self.max_model_len:,}, at which {self.compactions} times a stream was "
            "compacted"
        )


def server_command(model: Path, options: argparse.Namespace, port: int, store: Path) -> list[str]:
    settings = {
        "sink-tokens": SINK_TOKENS,
        "window-tokens": options.window,
        "max-model-len": options.length,
        "served-model-name": MODEL,
        "max-num-seqs": options.clients,
        "session-store": f"sqlite:{store}",
        "host": "127.0.0.1",
        "port": port,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "vllm_sink.serve", str(model), "--enforce-eager", *flags]


def passages(count: int) -> list[str]:
    """Passages of Newton's Opticks, each from a paragraph's start, spread over the book."""
    text = book()
    starts = [text.index("\n\n", len(text) * (i + 1) // (count + 2)) for i in range(count)]
    return [text[start : start + PASSAGE_CHARACTERS].strip() for start in starts]


async def stream_tokens(stream: Stream, server: Server, tokens: int) -> None:
    """Stream a chat completion until the stream is `tokens` long, its prompt included."""
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=None)
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=None) as plain:
            answer = await plain.post("/tokenize", json={"messages": stream.messages})
            stream.prompt_tokens = answer.raise_for_status().json()["count"]
        chunks = await client.chat.completions.create(
            model=MODEL,
            messages=stream.messages,
            max_completion_tokens=tokens - stream.prompt_tokens,
            temperature=0.7,
            stream=True,
            extra_body={
                "ignore_eos": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            },
        )
        async for chunk in chunks:
            if chunk.usage and chunk.usage.completion_tokens:
                text = chunk.choices[0].delta.content if chunk.choices else None
                stream.advance(chunk.usage.total_tokens, text or "")
    except (OpenAIError, httpx.HTTPError) as error:
        raise server.lost(error) from error


async def show(run: Run, server: Server) -> None:
    """Show progress until all streams are done: a live table, or lines without a terminal."""
    live = Live(run.table(), console=console, auto_refresh=False, transient=True)
    async with httpx.AsyncClient(base_url=server.url) as client:
        with live if console.is_terminal else nullcontext():
            while not run.done:
                await asyncio.sleep(REFRESH_SECONDS if console.is_terminal else LINE_SECONDS)
                with suppress(httpx.TransportError):
                    run.see(CacheUse.parse((await client.get("/metrics")).text))
                if console.is_terminal:
                    live.update(run.table(), refresh=True)
                else:
                    console.print(run.line(), soft_wrap=True, highlight=False)


async def demo(options: argparse.Namespace, model: Path) -> None:
    # As a cancellation, a signal can only come at an `await`: never between starting the server
    # and being ready to stop it, nor while it is being stopped.
    task = asyncio.current_task()
    assert task is not None
    for interruption in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(interruption, task.cancel)
    with TemporaryDirectory() as folder:
        store = Path(folder, "sessions.sqlite")
        conversation = Conversation(MODEL, console)
        async with started(model, options, store) as server:
            await stream(server, options)
            console.print("\nA conversation of one session, whose client sends new messages alone:")
            for passage in passages(PASSAGES_READ):
                await conversation.say(server, READ + passage)
            await conversation.say(server, TOLD)
            server.group.kill()
        console.print("The server was killed.")
        async with started(model, options, store) as server:
            await conversation.say(server, ASKED)
            console.print(await conversation.state(server), highlight=False)


@asynccontextmanager
async def started(model: Path, options: argparse.Namespace, store: Path) -> AsyncIterator[Server]:
    port = free_port()
    with serving(server_command(model, options, port, store), port) as server:
        console.print(f"Starting the server (port {port}, about a minute) ...")
        with console.status("loading the model"):
            await server.ready()
        yield server


async def stream(server: Server, options: argparse.Namespace) -> None:
    """Stream to all clients, until the last of them is done."""
    streams = [
        Stream(f"{i}", [{"role": "user", "content": INSTRUCTION + passage}])
        for i, passage in enumerate(passages(options.clients), 1)
    ]
    run = Run(streams, Geometry(SINK_TOKENS, options.window), options.tokens, options.length)
    await asyncio.gather(
        show(run, server),
        *(stream_tokens(stream, server, options.tokens) for stream in streams),
    )
    console.print(run.table())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument("--clients", type=int, default=4, help="streams at once (%(default)s)")
    parser.add_argument("--window", type=int, default=508, help="window W, tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, help="length of each stream, tokens (four windows)")
    options = parser.parse_args(arguments)
    cache = SINK_TOKENS + options.window
    options.length = max(2 * cache, 2 * LONGEST_PROMPT)
    options.tokens = options.tokens or 4 * cache + 64
    if options.tokens < LONGEST_PROMPT:
        parser.error(
            f"--tokens {options.tokens}: at least {LONGEST_PROMPT}, to go past the prompts"
        )
    return options


def main() -> int:
    options = parse()
    for interruption in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(interruption, signal.default_int_handler)
    try:
        asyncio.run(demo(options, embedded.path()))
    except (ServerLostError, embedded.EmbeddedModelError) as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print("Interrupted; no server is left running.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

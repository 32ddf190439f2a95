"""How many streams a KV pool holds, measured by filling it with real ones at full window.

Against the bound, the pool's blocks over the most that a stream holds, and against stock vLLM,
whose streams hold every token. The pool holds the streams if each of them receives a token in every
step while the window rolls over two blocks, and none is preempted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import cli, results, tiny
from benchmarks.harness.engine import Engine, Worker
from benchmarks.texts.passages import passages
from benchmarks.texts.tokens import book_tokens
from vllm_sink import cpu, embedded
from vllm_sink.geometry import Geometry, cdiv

BLOCK = 32
"""Tokens; the smallest that vLLM's CPU backend takes."""
STEPS = 2 * BLOCK

console = Console()


@dataclass(frozen=True)
class Plan:
    sink_tokens: int = 4
    window_tokens: int = 508
    pool_blocks: int = 580
    chunk: int = 2048
    """Tokens of a step at most."""
    dense_contexts: tuple[int, ...] = (4_096, 32_768, 131_072, 1_048_576)
    """Tokens; the first is measured, the others follow from their blocks."""

    @property
    def bound(self) -> int:
        """Streams that fit the pool when each holds its most blocks."""
        geometry = Geometry(self.sink_tokens, self.window_tokens)
        return self.pool_blocks // geometry.max_blocks(BLOCK)

    @property
    def text_tokens(self) -> int:
        return self.pool_blocks * BLOCK + 2 * self.dense_contexts[0]


QUICK = Plan(window_tokens=60, pool_blocks=40, chunk=256, dense_contexts=(320, 32_768))


@dataclass(frozen=True)
class Bench:
    model: str
    dtype: str
    plan: Plan
    text: list[int]

    def sinks(self, streams: int) -> dict[str, Any]:
        """Streams that have passed S + W by up to a block, each by another number of tokens."""
        sink = {"sink_tokens": self.plan.sink_tokens, "window_tokens": self.plan.window_tokens}
        full = self.plan.sink_tokens + self.plan.window_tokens
        lengths = [full + i % BLOCK for i in range(streams)]
        return self.hold(lengths, max_model_len=2**20, additional_config={"sink": sink})

    def dense(self) -> dict[str, Any]:
        """Stock vLLM's, as many as the pool has blocks for, growing to the first context."""
        context = self.plan.dense_contexts[0]
        streams = self.plan.pool_blocks // cdiv(context, BLOCK)
        return self.hold([context - 2 * STEPS] * streams, max_model_len=context)

    def hold(self, lengths: list[int], **arguments: Any) -> dict[str, Any]:
        """Offer streams of so many tokens and see how they go on."""
        texts = passages(self.text, len(lengths), max(lengths))
        prompts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
        with Worker(
            self.model,
            dtype=self.dtype,
            block_size=BLOCK,
            # One more: the null block is never a stream's.
            num_gpu_blocks_override=self.plan.pool_blocks + 1,
            max_num_seqs=len(lengths),
            max_num_batched_tokens=self.plan.chunk,
            disable_log_stats=False,
            **arguments,
        ) as worker:
            worker.run(Engine.offer, prompts)
            worker.run(Engine.streaming, sum(lengths) // (self.plan.chunk - len(lengths)) + 2)
            streaming = worker.run(Engine.streaming, STEPS)
            state = worker.run(Engine.state)
        return {
            "offered": len(lengths),
            "streaming": min(streaming),
            "preemptions": state.preemptions,
            "kv_blocks": state.kv_blocks,
        }


def bounds(plan: Plan) -> dict[str, Any]:
    """What follows from sizes alone."""
    return {
        "pool_tokens": plan.pool_blocks * BLOCK,
        "bound": plan.bound,
        "dense_by_blocks": {
            context: round(plan.pool_blocks / cdiv(context, BLOCK), 3)
            for context in plan.dense_contexts
        },
    }


def show(figures: dict[str, Any]) -> None:
    table = Table("", "offered", "streaming", "preemptions", "KV blocks")
    for name in ("sink", "sink_offered_more", "dense"):
        table.add_row(name.replace("_", " "), *(str(value) for value in figures[name].values()))
    console.print(table)
    console.print(
        f"Pool of {figures['pool_tokens']:,} tokens; bound {figures['bound']} streams; dense "
        + ", ".join(
            f"{held:g} at {context:,}" for context, held in figures["dense_by_blocks"].items()
        )
        + "."
    )


@contextmanager
def task(quick: bool) -> Iterator[Bench]:
    if quick:
        with tiny.llama() as folder:
            yield Bench(folder, "float32", QUICK, tiny.tokens(QUICK.text_tokens))
    else:
        model, plan = str(embedded.path()), Plan()
        yield Bench(model, cpu.fast_dtype(), plan, book_tokens(model, plan.text_tokens))


def main() -> None:
    options = cli.parser(__doc__, resumable=True).parse_args()
    path = cli.folder(options) / "capacity.json"
    with task(options.quick) as bench:
        plan = bench.plan
        setup = {"model": Path(bench.model).name, "dtype": bench.dtype, **asdict(plan)}
        setup |= {"block": BLOCK, "steps": STEPS}
        fills: dict[str, Callable[[], dict[str, Any]]] = {
            "sink": lambda: bench.sinks(plan.bound),
            "sink_offered_more": lambda: bench.sinks(plan.bound + cdiv(plan.bound, 4)),
            "dense": bench.dense,
        }
        earlier = results.stored(path, setup, options.fresh) or {}
        figures = earlier | {"setup": setup, **bounds(plan)}
        for name, fill in fills.items():
            if name not in figures:
                with console.status(name.replace("_", " ")):
                    figures[name] = fill()
                figures["sink_over_bound"] = round(figures["sink"]["streaming"] / plan.bound, 4)
                results.write(path, "benchmarks.capacity", figures)
    show(figures)


if __name__ == "__main__":
    cli.run(main)

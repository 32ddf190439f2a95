"""A token's latency here and with re-computation, which reads the whole window for every token.

The comparison of figure 10 of the paper, on one core: one stream with a full cache, against stock
vLLM with a prompt of the last S + W tokens for each token.
Beside the measured ratio stands the one that this core allows: matrix products at its peak rate for
the one, every weight and cached key and value read once at its memory bandwidth for the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.harness import cli, results, tiny
from benchmarks.harness.engine import Engine, Worker
from benchmarks.harness.floors import BYTES, Ceilings, Forward, ceilings
from benchmarks.texts.tokens import book_tokens
from vllm_sink import cpu, embedded

SINKS = 4

console = Console()


@dataclass(frozen=True)
class Plan:
    caches: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """S + W."""
    rounds: int = 5
    """Turns of each arm."""
    steps: int = 16
    """Of ours in a turn; re-computation has one."""


QUICK = Plan(caches=(64, 256), rounds=2, steps=4)


def measure(
    caches: list[int], plan: Plan, model: str, dtype: str, text: list[int]
) -> Iterator[tuple[int, list[float], list[float]]]:
    """For each S + W of `caches`, the milliseconds a token in each turn: ours and re-computed."""
    largest = max(plan.caches)
    common: dict[str, Any] = {
        "pinned": True,
        "dtype": dtype,
        "max_num_seqs": 1,
        "max_num_batched_tokens": largest + 1,
    }
    with (
        Worker(model, max_model_len=largest + 1, **common) as stock,
        Progress(console=console) as progress,
    ):
        task = progress.add_task("", total=len(caches) * plan.rounds)
        for cache in caches:
            progress.update(task, description=f"S + W = {cache:,}")
            sink = {"sink": {"sink_tokens": SINKS, "window_tokens": cache - SINKS}}
            end = 2 * cache + plan.rounds * plan.steps + 1
            ours: list[float] = []
            recompute: list[float] = []
            with Worker(model, max_model_len=end, additional_config=sink, **common) as worker:
                worker.run(Engine.fill, [text[: 2 * cache]])
                for _ in range(plan.rounds):
                    ours.append(1000 * median(worker.run(Engine.time_steps, plan.steps)))
                    recompute.append(1000 * stock.run(Engine.time_prompt, text[:cache]))
                    progress.advance(task)
            yield cache, ours, recompute


def summary(
    cache: int, ours: list[float], recompute: list[float], forward: Forward, core: Ceilings
) -> dict[str, Any]:
    """Floors in milliseconds; ratios are re-computation's time over ours."""
    ours_floor = 1000 * forward.bytes_read(cache) / core.bytes_read
    recompute_floor = 1000 * forward.multiply_adds(cache) / core.multiply_adds
    ratios = [b / a for a, b in zip(ours, recompute, strict=True)]
    return {
        "cache": cache,
        "ours_ms": results.spread(ours, 2),
        "recompute_ms": results.spread(recompute, 2),
        "ratio": results.spread(ratios, 2),
        "ours_floor_ms": round(ours_floor, 4),
        "recompute_floor_ms": round(recompute_floor, 4),
        "ratio_of_floors": round(recompute_floor / ours_floor, 2),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("S + W", "ours ms", "floor", "re-computed ms", "floor", "ratio", "of floors")
    for row in rows:
        table.add_row(
            f"{row['cache']:,}",
            f"{row['ours_ms']['median']:.1f}",
            f"{row['ours_floor_ms']:.1f}",
            f"{row['recompute_ms']['median']:.0f}",
            f"{row['recompute_floor_ms']:.0f}",
            f"{row['ratio']['median']:.1f}",
            f"{row['ratio_of_floors']:.1f}",
        )
    console.print(table)


@contextmanager
def task(quick: bool) -> Iterator[tuple[str, Plan, list[int]]]:
    """The model, what is done with it, and a text of twice the largest cache."""
    if quick:
        with tiny.llama() as folder:
            yield folder, QUICK, tiny.tokens(2 * max(QUICK.caches))
    else:
        model = str(embedded.path())
        yield model, Plan(), book_tokens(model, 2 * max(Plan.caches))


def main() -> None:
    from transformers import AutoConfig

    options = cli.parser(__doc__, resumable=True).parse_args()
    path = cli.folder(options) / "recompute.json"
    dtype = cpu.fast_dtype()
    with task(options.quick) as (model, plan, text):
        setup = {"model": Path(model).name, "dtype": dtype, "sinks": SINKS, **asdict(plan)}
        earlier = results.stored(path, setup, options.fresh) or {}
        rows = earlier.get("rows", [])
        core = Ceilings(**earlier["core"]) if rows else ceilings(dtype)
        forward = Forward(AutoConfig.from_pretrained(model), BYTES[dtype])
        left = [cache for cache in plan.caches if cache not in {row["cache"] for row in rows}]
        for turns in measure(left, plan, model, dtype, text):
            rows.append(summary(*turns, forward, core))
            figures = {"setup": setup, "core": asdict(core), "rows": rows}
            results.write(path, "benchmarks.recompute", figures)
    show(rows)


if __name__ == "__main__":
    cli.run(main)

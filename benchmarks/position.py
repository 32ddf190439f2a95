"""Far down a stream a step costs what it costs near its start, and so does the stream's memory.

Two engines with the same tiny random Llama take turns: the stream of one is at position 4,000, that
of the other at 200,000. Then they change roles, so that no difference between two processes is
taken for one between two positions.
"""

import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import results
from benchmarks.engine import Engine, Memory, Worker

SINK = {"sink": {"sink_tokens": 4, "window_tokens": 508}}
SEED = 0
VOCABULARY = 128
MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 2**20,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 2048,
    "num_gpu_blocks_override": 64,
    "disable_log_stats": False,
}

console = Console()


@dataclass(frozen=True)
class Plan:
    near: int = 4_000
    far: int = 200_000
    rounds: int = 20
    """Turns at each position, for each assignment of roles."""
    steps: int = 50
    """Steps in a turn."""


QUICK = Plan(near=1_000, far=10_000, rounds=2)


@dataclass
class Place:
    """What was seen at one position."""

    steps_ms: list[float]
    """The median of each turn."""
    memory: list[Memory]
    """For each assignment of roles; the second time, both processes have been far."""

    def summary(self) -> dict[str, Any]:
        return {
            "step_ms": results.spread(self.steps_ms),
            "kv_blocks": [memory.kv_blocks for memory in self.memory],
            "rss_mib": [memory.rss_mib for memory in self.memory],
        }


def measure(plan: Plan) -> tuple[Place, Place]:
    near, far = Place([], []), Place([], [])
    with (
        tiny_llama() as model,
        Worker(model, additional_config=SINK, **ENGINE) as a,
        Worker(model, additional_config=SINK, **ENGINE) as b,
        Progress(console=console) as progress,
    ):
        task = progress.add_task("", total=2 * plan.rounds)
        for near_worker, far_worker in ((a, b), (b, a)):
            turns = ((near, near_worker, plan.near), (far, far_worker, plan.far))
            for _, worker, position in turns:
                progress.update(task, description=f"reading {position:,} tokens")
                worker.run(Engine.fill, [tokens(position)])
            progress.update(task, description="stepping")
            for _ in range(plan.rounds):
                for place, worker, _ in turns:
                    seconds = worker.run(Engine.time_steps, plan.steps)
                    place.steps_ms.append(1000 * median(seconds))
                progress.advance(task)
            for place, worker, _ in turns:
                place.memory.append(worker.run(Engine.memory))
    return near, far


@contextmanager
def tiny_llama() -> Iterator[Path]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)
        yield Path(folder)


def tokens(count: int) -> list[int]:
    return random.Random(SEED).choices(range(VOCABULARY), k=count)


def show(plan: Plan, near: Place, far: Place, ratio: dict[str, float]) -> None:
    table = Table("position", "step ms: min", "median", "max", "KV blocks", "RSS MiB")
    for position, place in ((plan.near, near), (plan.far, far)):
        summary = place.summary()
        milliseconds = (f"{value:.3f}" for value in summary["step_ms"].values())
        table.add_row(
            f"{position:,}", *milliseconds, str(summary["kv_blocks"]), str(summary["rss_mib"])
        )
    table.add_row("ratio", *(f"{value:.3f}" for value in ratio.values()))
    console.print(table)


def main() -> int:
    options = results.parser(__doc__).parse_args()
    plan = QUICK if options.quick else Plan()
    near, far = measure(plan)
    ratio = results.spread([b / a for a, b in zip(near.steps_ms, far.steps_ms, strict=True)])
    show(plan, near, far, ratio)
    figures = {
        "setup": {"model": MODEL, "seed": SEED, "engine": ENGINE, **SINK, **asdict(plan)},
        "near": near.summary(),
        "far": far.summary(),
        "ratio": ratio,
    }
    results.write(results.folder(options) / "position.json", "benchmarks.position", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())

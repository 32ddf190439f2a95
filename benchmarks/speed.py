"""Decode and prefill on this machine's CPU, against stock vLLM at the same context.

Two engines take turns, round by round. Decode: 8 streams, then one; ours are past S + W = 1024
tokens, stock's contexts grow through 1024. What sinks cost: 8 streams against our window of 1024
alone. Half-way some steps are profiled. Prefill: one long prompt; stock has a sliding window of
1024, on the same weights read as a Mistral, which is a Llama with a window.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import cli, results
from benchmarks.harness.engine import Engine, Worker
from benchmarks.texts.passages import passages
from benchmarks.texts.tokens import book_tokens
from vllm_sink import cpu, embedded

SINKS = 4
CACHE = 1024
SINK = {"sink": {"sink_tokens": SINKS, "window_tokens": CACHE - SINKS}}
WINDOW = {"sink": {"policy": "window", "window_tokens": CACHE}}
ENGINE = {
    "max_model_len": 8192,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 2048,
    "num_gpu_blocks_override": 192,
}

OPERATORS = {
    "_C::onednn_mm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::mm": "matrix products",
    "vllm_sink::attend": "attention",
    "_C::cpu_attention_with_kv_cache": "attention",
    "vllm_sink::write": "writing to the cache",
    "_C::cpu_attn_reshape_and_cache": "writing to the cache",
}

console = Console()


@dataclass(frozen=True)
class Plan:
    streams: int = 8
    passes: int = 2
    """Decode in new processes: the same engine is some percent faster in one than in another."""
    rounds: int = 16
    """Turns of each arm in a pass."""
    steps: int = 8
    """Steps in a turn."""
    prompt_tokens: int = 1100
    """Of our streams, at the start of a pass."""
    prefill_rounds: int = 5
    prefill_tokens: int = 4000


QUICK = Plan(
    streams=2,
    passes=1,
    rounds=2,
    steps=4,
    prompt_tokens=1100,
    prefill_rounds=1,
    prefill_tokens=1500,
)


@dataclass(frozen=True)
class Arm:
    """An engine, and its streams' tokens at the start of a pass."""

    arguments: dict[str, Any]
    prompt_tokens: int


def decode(model: Path, ours: Arm, other: Arm, tokens: list[int], plan: Plan) -> dict[str, Any]:
    """Milliseconds a step."""
    turns: tuple[list[float], list[float]] = ([], [])
    spent: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for _ in track(range(plan.passes), "decode", console=console):
        with (
            Worker(model, pinned=True, **ours.arguments) as a,
            Worker(model, pinned=True, **other.arguments) as b,
        ):
            for worker, arm in ((a, ours), (b, other)):
                worker.run(Engine.fill, passages(tokens, plan.streams, arm.prompt_tokens))
            for turn in range(plan.rounds):
                for worker, figures in zip((a, b), turns, strict=True):
                    figures.append(1000 * median(worker.run(Engine.time_steps, plan.steps)))
                if turn == plan.rounds // 2:
                    for worker, profiles in zip((a, b), spent, strict=True):
                        profiles.append(parts(worker.run(Engine.profile, plan.steps)))
    where = {"ours": middle(spent[0]), "other": middle(spent[1])}
    return comparison(*turns) | {"parts": where}


def parts(operators: dict[str, float]) -> dict[str, float]:
    """Milliseconds a step, summed by what they are for."""
    sums = dict.fromkeys([*OPERATORS.values(), "other operators"], 0.0)
    for name, spent in operators.items():
        sums[OPERATORS.get(name, "other operators")] += spent
    return sums


def middle(profiles: list[dict[str, float]]) -> dict[str, float]:
    """The median of each part over all passes."""
    return {part: round(median(spent[part] for spent in profiles), 2) for part in profiles[0]}


def prefill(model: Path, engine: dict[str, Any], tokens: list[int], plan: Plan) -> dict[str, Any]:
    """Tokens a second."""
    (prompt,) = passages(tokens, 1, plan.prefill_tokens)
    ours: list[float] = []
    stock: list[float] = []
    with (
        windowed(model) as mistral,
        Worker(model, additional_config=SINK, pinned=True, **engine) as a,
        Worker(mistral, pinned=True, **engine) as b,
    ):
        for worker in (a, b):
            worker.run(Engine.time_prompt, prompt)
        for _ in track(range(plan.prefill_rounds), "prefill", console=console):
            ours.append(len(prompt) / a.run(Engine.time_prompt, prompt))
            stock.append(len(prompt) / b.run(Engine.time_prompt, prompt))
    return comparison(ours, stock)


@contextmanager
def windowed(llama: Path) -> Iterator[Path]:
    """The checkpoint under a config of `MistralForCausalLM`, the same graph with a window."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for file in llama.iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
        config |= {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": CACHE,
        }
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder


def comparison(ours: list[float], other: list[float]) -> dict[str, Any]:
    """Of the rounds of both arms, and of ours / the other's in each pair of rounds."""
    return {
        "ours": results.spread(ours, 1),
        "other": results.spread(other, 1),
        "ratio": results.spread([a / b for a, b in zip(ours, other, strict=True)]),
        "rounds": {"ours": [round(x, 1) for x in ours], "other": [round(x, 1) for x in other]},
    }


def show(figures: dict[str, dict[str, Any]]) -> None:
    table = Table("", "arm", "min", "median", "max")
    for name, comparison in figures.items():
        for arm in ("ours", "other", "ratio"):
            table.add_row(name, arm, *(f"{value:g}" for value in comparison[arm].values()))
        table.add_section()
    console.print(table)
    for name, comparison in figures.items():
        for arm, spent in comparison.get("parts", {}).items():
            console.print(f"{name}, {arm}, ms in a profiled step: {spent}")


def main() -> None:
    options = cli.parser(__doc__, resumable=True).parse_args()
    plan = QUICK if options.quick else Plan()
    model = embedded.path()
    tokens = book_tokens(model, 40_000)
    engine = {"dtype": cpu.fast_dtype(), **ENGINE}
    ours = Arm({"additional_config": SINK, **engine}, plan.prompt_tokens)
    window = Arm({"additional_config": WINDOW, **engine}, plan.prompt_tokens)
    # Through S + W tokens at half of its steps, those that are profiled included.
    stock = Arm(engine, CACHE - (plan.rounds + 1) * plan.steps // 2)
    alone = replace(plan, streams=1, passes=1)
    comparisons: dict[str, Callable[[], dict[str, Any]]] = {
        "decode_ms_a_step": partial(decode, model, ours, stock, tokens, plan),
        "decode_ms_a_step_of_one_stream": partial(decode, model, ours, stock, tokens, alone),
        "decode_ms_a_step_over_window": partial(decode, model, ours, window, tokens, plan),
        "prefill_tokens_a_second": partial(prefill, model, engine, tokens, plan),
    }
    path = cli.folder(options) / "speed.json"
    setup = {"model": model.name, "engine": engine, **SINK, **asdict(plan)}
    figures = results.stored(path, setup, options.fresh) or {"setup": setup}
    for name, compare in comparisons.items():
        if name not in figures:
            figures[name] = compare()
            results.write(path, "benchmarks.speed", figures)
    show({name: figures[name] for name in comparisons})


if __name__ == "__main__":
    cli.run(main)

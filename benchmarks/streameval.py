"""StreamEval in spirit: is an answer that was given d tokens ago still known?

A stream of real text has facts planted in it, "[code word of Anna: river]". Once the cache is full,
each fact is asked for in its own words, "[code word of Anna:", at every distance d from the answer
to its repetition, and the model's greedy next token has to be the answer. Each question branches
off the stream, so that none stands in the way of the next. A guess among all code words is right
once in 40. The wording is the one, of ten tried, that stock vLLM answers best.
An arm is written as soon as it is read, and not read again unless --fresh or its setup changed.
"""

import math
import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import cli, results
from benchmarks.harness.engine import Engine, Worker
from benchmarks.texts.tokens import book_tokens
from vllm_sink import embedded

# Each name and each code word is one token of the embedded model.
NAMES = """Anna Peter Maria David Laura Simon Alice Martin Helen Robert Julia Thomas Sarah Daniel
    Emma Oliver Clara Victor Rachel George"""
WORDS = """river stone garden window candle bridge forest silver hammer basket mountain pocket
    ladder carpet lemon winter falcon butter copper island mirror orange pencil tiger velvet wagon
    anchor blanket castle desert engine feather guitar harbor jacket kettle lantern magnet needle
    ocean"""
CONFIDENCE = 0.95
ENGINE: dict[str, Any] = {
    # Faster than bfloat16 on a CPU without instructions for it.
    "dtype": "float32",
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    # A question is computed alone: the stream before it is in the prefix cache.
    "enable_prefix_caching": True,
    "block_size": 32,
}

console = Console()


@dataclass(frozen=True)
class Plan:
    arms: tuple[str, ...]
    """`sink`, `window` (alone, of the same size) or `full` (stock vLLM)."""
    streams: int
    facts: int
    """A stream's, the first of them at token `cache`."""
    spacing: int
    """Tokens from one fact to the next."""
    cache: int
    """S + W."""
    distances: tuple[int, ...]
    sinks: int = 4

    @property
    def stream_tokens(self) -> int:
        return self.cache + self.facts * self.spacing + max(self.distances)

    @property
    def in_sight(self) -> int:
        """The largest distance at which the sink arm's window still holds the answer."""
        return self.cache - self.sinks

    def sink(self, arm: str) -> dict[str, Any]:
        settings = {
            "sink": {"sink_tokens": self.sinks, "window_tokens": self.in_sight},
            "window": {"policy": "window", "window_tokens": self.cache},
        }
        return {"sink": settings[arm]} if arm in settings else {}


ARMS = ("sink", "window", "full")
DISTANCES = (32, 64, 128, 256, 384, 480, 512, 640, 768, 1024)
PLAN = Plan(ARMS, streams=3, facts=20, spacing=48, cache=512, distances=DISTANCES)
QUICK = Plan(("sink",), streams=1, facts=8, spacing=32, cache=128, distances=(32, 256))


@dataclass(frozen=True)
class Fact:
    question: list[int]
    answer: int
    position: int
    """Of the answer in its stream."""


@dataclass(frozen=True)
class Stream:
    tokens: list[int]
    facts: list[Fact]

    def asked(self, fact: Fact, distance: int) -> list[int]:
        """The stream up to a question whose answer is `distance` tokens after the fact's."""
        return self.tokens[: fact.position + distance - len(fact.question)] + fact.question


def streams(plan: Plan, model: Path) -> list[Stream]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def encode(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    length = plan.stream_tokens
    text = book_tokens(model, plan.streams * length)
    planted = []
    for i in range(plan.streams):
        filler = iter(text[i * length : (i + 1) * length])
        pairs = random.Random(i)
        tokens = [next(filler) for _ in range(plan.cache)]
        facts = []
        for name, word in zip(
            pairs.sample(NAMES.split(), plan.facts),
            pairs.sample(WORDS.split(), plan.facts),
            strict=True,
        ):
            question, (answer,), end = (
                encode(part) for part in (f"\n[code word of {name}:", f" {word}", "]\n")
            )
            facts.append(Fact(question, answer, len(tokens) + len(question)))
            fact = [*question, answer, *end]
            tokens += [*fact, *(next(filler) for _ in range(plan.spacing - len(fact)))]
        tokens += [next(filler) for _ in range(max(plan.distances))]
        planted.append(Stream(tokens, facts))
    return planted


def next_tokens(engine: Engine, prompts: list[list[int]]) -> list[int]:
    """The likeliest token after each prompt."""
    from vllm import SamplingParams

    outputs = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, temperature=0, detokenize=False),
        use_tqdm=False,
    )
    return [output.outputs[0].token_ids[0] for output in outputs]


def read(plan: Plan, arm: str, model: Path) -> dict[str, list[int]]:
    """Right answers at each distance."""
    right = [0] * len(plan.distances)
    with Worker(
        model,
        max_model_len=plan.stream_tokens + 1,
        additional_config=plan.sink(arm),
        **ENGINE,
    ) as worker:
        for stream in track(streams(plan, model), arm):
            worker.run(next_tokens, [stream.tokens])
            for i, distance in enumerate(plan.distances):
                asked = [stream.asked(fact, distance) for fact in stream.facts]
                given = worker.run(next_tokens, asked)
                right[i] += sum(
                    token == fact.answer for token, fact in zip(given, stream.facts, strict=True)
                )
    return {"right": right}


def measure(plan: Plan, model: Path, raw: Path, fresh: bool) -> dict[str, list[int]]:
    """Each arm's right answers, from the folder `raw` or else from the model."""
    right: dict[str, list[int]] = {}
    for arm in plan.arms:
        path = raw / f"{arm}.json"
        setup = {"arm": arm, "model": model.name, "engine": ENGINE, **asdict(plan)}
        answers = partial(read, plan, arm, model)
        right[arm] = results.kept(path, "benchmarks.streameval", setup, fresh, answers)["right"]
    return right


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The interval that holds the true share with `CONFIDENCE`."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = right + z**2 / 2
    half = z * math.sqrt(right * (asked - right) / asked + z**2 / 4)
    return max(0.0, (centre - half) / (asked + z**2)), min(1.0, (centre + half) / (asked + z**2))


def accuracy(right: int, asked: int) -> dict[str, Any]:
    return {
        "right": right,
        "asked": asked,
        "accuracy": round(right / asked, 4),
        "interval": [round(bound, 4) for bound in wilson(right, asked)],
    }


def show(plan: Plan, arms: dict[str, list[dict[str, Any]]]) -> None:
    table = Table("tokens ago", *arms)
    for distance, *row in zip(plan.distances, *arms.values(), strict=True):
        table.add_row(
            f"{distance:,}",
            *(
                "{accuracy:.2f} ({interval[0]:.2f}-{interval[1]:.2f})".format(**cell)
                for cell in row
            ),
        )
    console.print(table)
    console.print(
        f"Sinks and window hold an answer up to {plan.in_sight} tokens ago, the window alone up to "
        f"{plan.cache}. Right of {plan.streams * plan.facts}; in brackets the Wilson interval, "
        f"{CONFIDENCE:.0%}."
    )


def main() -> None:
    options = cli.parser(__doc__, resumable=True).parse_args()
    plan = QUICK if options.quick else PLAN
    model = embedded.path()
    target = cli.folder(options)
    right = measure(plan, model, target / "streameval", options.fresh)
    asked = plan.streams * plan.facts
    arms = {arm: [accuracy(count, asked) for count in counts] for arm, counts in right.items()}
    show(plan, arms)
    results.write(
        target / "streameval.json",
        "benchmarks.streameval",
        {
            "setup": {"model": model.name, "engine": ENGINE, **asdict(plan)},
            "in_sight": plan.in_sight,
            "chance": 1 / len(WORDS.split()),
            "arms": arms,
        },
    )


if __name__ == "__main__":
    cli.run(main)

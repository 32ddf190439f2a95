"""How well a model predicts a long text when it keeps sinks, a window alone, or everything.

Each arm reads the text as one prompt in real vLLM and notes every token's negative log-likelihood.
Re-computation, for which each token costs a forward pass over the whole window, reads a sample.
An arm is written as soon as it is read, and not read again unless --fresh or its setup changed.
"""

import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import cli, results
from benchmarks.harness.engine import Engine
from benchmarks.texts.likelihood import by_thousand, far_over_fresh, perplexity, ratio
from benchmarks.texts.reading import CHUNK, DTYPE, reader
from benchmarks.texts.tokens import book_tokens, novel_tokens
from vllm_sink import embedded

SEED = 0

console = Console()


@dataclass(frozen=True)
class Arm:
    """A text read from beginning to end."""

    name: str
    tokens: int
    sink: dict[str, Any] | None
    """Settings of this project; None is stock vLLM."""
    start: int = 0
    """The token of the text that is the first of the stream."""

    def read(self, model: str, text: list[int]) -> list[float]:
        """Negative log-likelihood of each token but the first, in nats."""
        with reader(model, self.tokens, self.sink) as worker:
            passage = text[self.start : self.start + self.tokens]
            return worker.run(Engine.nll, passage, CHUNK, self.name)


@dataclass(frozen=True)
class Recompute:
    """Stock vLLM reads the last `cache` tokens anew for each of `samples` tokens of the text."""

    name: str
    tokens: int
    cache: int
    samples: int

    @property
    def positions(self) -> list[int]:
        """Of the tokens that are predicted; all have a full cache before them."""
        return sorted(random.Random(SEED).sample(range(self.cache, self.tokens), self.samples))

    def read(self, model: str, text: list[int]) -> list[float]:
        windows = [text[position - self.cache : position + 1] for position in self.positions]
        with reader(model, self.cache) as worker:
            return worker.run(Engine.last_nll, windows, self.name)


@dataclass(frozen=True)
class Plan:
    arms: tuple[Arm, ...]
    """Among them "sink-4", and "sink-4-fresh", which begins in the middle of its text."""
    recompute: Recompute


def plan(tokens: int, cache: int) -> Plan:
    """S + W = `cache` in every arm with sinks or a window."""

    def sink(count: int, **more: Any) -> dict[str, Any]:
        return {"sink_tokens": count, "window_tokens": cache - count, **more}

    window = {"policy": "window", "window_tokens": cache}
    half = tokens // 2
    return Plan(
        (
            # As far as the embedded model was trained, and about twice as far.
            Arm("dense", 8_000, None),
            Arm("full", 16_000, {"policy": "full"}),
            Arm("window", tokens, window),
            *(Arm(f"sink-{count}", tokens, sink(count)) for count in (1, 2, 4, 8)),
            *(
                Arm(f"sink-{count}-stream-positions", tokens, sink(count, reindex=False))
                for count in (1, 2, 4, 8)
            ),
            # Tells text and position apart.
            Arm("sink-4-fresh", tokens - half, sink(4), start=half),
        ),
        Recompute("recompute", tokens, cache, samples=256),
    )


PLAN = plan(33_000, 1024)
QUICK = Plan(
    (
        Arm("window", 600, {"policy": "window", "window_tokens": 64}),
        Arm("sink-4", 600, {"sink_tokens": 4, "window_tokens": 60}),
        Arm("sink-4-fresh", 300, {"sink_tokens": 4, "window_tokens": 60}, start=300),
    ),
    Recompute("recompute", 600, cache=64, samples=64),
)


def measure(
    plan: Plan, common: dict[str, Any], model: str, text: list[int], raw: Path, fresh: bool
) -> dict[str, list[float]]:
    """Each arm's likelihoods, from the folder `raw` or else from the model, which takes minutes.

    `common` is what the setup of every arm has.
    """
    nlls: dict[str, list[float]] = {}
    arms: list[Arm | Recompute] = [*plan.arms, plan.recompute]
    for arm in arms:
        path = raw / f"{arm.name}.json"
        setup = {**common, **asdict(arm)}
        read = partial(_read, arm, model, text)
        nlls[arm.name] = results.kept(path, "benchmarks.perplexity", setup, fresh, read)["nll"]
    return nlls


def _read(arm: Arm | Recompute, model: str, text: list[int]) -> dict[str, Any]:
    return {"nll": [round(nll, 4) for nll in arm.read(model, text)]}


def figures(plan: Plan, nlls: dict[str, list[float]]) -> dict[str, Any]:
    sink, recomputed = nlls["sink-4"], nlls["recompute"]
    sampled = [sink[position - 1] for position in plan.recompute.positions]
    return {
        "arms": {
            arm.name: {
                "perplexity": round(perplexity(nlls[arm.name]), 3),
                "by_thousand": [round(value, 3) for value in by_thousand(nlls[arm.name])],
            }
            for arm in plan.arms
        },
        "recompute": {
            "perplexity": round(perplexity(recomputed), 3),
            "sink_on_the_same_tokens": round(perplexity(sampled), 3),
            "sink_over_recompute": ratio(sampled, recomputed),
        },
        "far_over_fresh": [round(value, 4) for value in far_over_fresh(sink, nlls["sink-4-fresh"])],
    }


def show(plan: Plan, found: dict[str, Any]) -> None:
    table = Table("arm", "tokens", "perplexity", "first thousand", "last")
    for arm in plan.arms:
        seen = found["arms"][arm.name]
        values = (seen["perplexity"], seen["by_thousand"][0], seen["by_thousand"][-1])
        table.add_row(arm.name, f"{arm.tokens:,}", *(f"{value:.2f}" for value in values))
    console.print(table)
    recompute = found["recompute"]
    console.print(
        f"At the sampled tokens: sinks {recompute['sink_on_the_same_tokens']:.2f}, "
        f"re-computation {recompute['perplexity']:.2f}; "
        "ratio {ratio:.4f}, standard error {standard_error:.4f}.".format(
            **recompute["sink_over_recompute"]
        )
    )
    if found["far_over_fresh"]:
        least, most = min(found["far_over_fresh"]), max(found["far_over_fresh"])
        console.print(f"The second half over a stream begun there: {least:.4f} to {most:.4f}.")


def main() -> None:
    parser = cli.parser(__doc__, resumable=True)
    parser.add_argument("--model", help="a checkpoint or its name (default: the embedded model)")
    options = parser.parse_args()
    model = options.model or str(embedded.path())
    if options.quick:
        plan, text, title = QUICK, book_tokens(model), "Newton's Opticks"
    else:
        plan, text, title = PLAN, novel_tokens(model), "Jane Austen's novels"
    target = cli.folder(options)
    setup = {
        "model": options.model or Path(model).name,
        "text": title,
        "dtype": DTYPE,
        "seed": SEED,
    }
    nlls = measure(plan, setup, model, text, target / "perplexity", options.fresh)
    found = figures(plan, nlls)
    show(plan, found)
    record = {"setup": {**setup, **asdict(plan)}, **found}
    results.write(target / "perplexity.json", "benchmarks.perplexity", record)


if __name__ == "__main__":
    cli.run(main)

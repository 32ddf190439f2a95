"""How well a model predicts a book when it keeps sinks, a window alone, or everything.

Each arm reads the book as one prompt in real vLLM and notes every token's negative log-likelihood.
An arm is written as soon as it is read, and not read again unless --fresh or its setup changed.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.engine import Engine, Worker
from benchmarks.text import book_tokens
from vllm_sink import embedded

DTYPE = "float32"
CHUNK = 512
"""Tokens of a step: their log-probabilities over the vocabulary are held at once."""
THOUSAND = 1000
TRAINED_CONTEXT = 8192

console = Console()


@dataclass(frozen=True)
class Arm:
    name: str
    tokens: int
    sink: dict[str, Any] | None
    """Settings of this project; None is stock vLLM."""
    start: int = 0
    """The token of the book that is the first of the stream."""

    @property
    def key(self) -> str:
        return f"{self.name}-{self.tokens}"

    def setup(self, model: Path) -> dict[str, Any]:
        return {"model": model.name, "dtype": DTYPE, "chunk": CHUNK, **asdict(self)}

    def read(self, model: Path) -> list[float]:
        """Negative log-likelihood of each token but the first, in nats."""
        arguments: dict[str, Any] = {
            "dtype": DTYPE,
            "max_model_len": self.tokens + 1,
            "max_num_seqs": 1,
            "max_num_batched_tokens": CHUNK,
        }
        if self.sink is not None:
            arguments["additional_config"] = {"sink": self.sink}
        text = book_tokens(model, self.start + self.tokens)[self.start :]
        with Worker(model, **arguments) as worker:
            return worker.run(Engine.nll, text, CHUNK, self.key)


ARMS = (
    Arm("dense", 4_000, None),
    Arm("sink", 4_000, {"sink_tokens": 4, "window_tokens": 512}),
    Arm("window", 4_000, {"policy": "window", "window_tokens": 512}),
    Arm("sink", 16_000, {"sink_tokens": 4, "window_tokens": 1020}),
    Arm("window", 16_000, {"policy": "window", "window_tokens": 1024}),
    # The second half of the same text at positions 0 to 7,999: tells text and position apart.
    Arm("fresh", 8_000, {"sink_tokens": 4, "window_tokens": 1020}, start=8_000),
    # Stock's rotary table ends with the trained context.
    Arm("dense", 16_000, {"policy": "full"}),
)
QUICK = (
    Arm("sink", 300, {"sink_tokens": 4, "window_tokens": 60}),
    Arm("window", 300, {"policy": "window", "window_tokens": 64}),
)


def perplexity(nll: list[float]) -> float:
    return math.exp(fmean(nll))


def by_thousand(nll: list[float]) -> list[float]:
    """Perplexity of tokens 0-999, 1000-1999 and so on; the first token of all has none."""
    positioned = [math.nan, *nll]
    thousands = [positioned[i : i + THOUSAND] for i in range(0, len(positioned), THOUSAND)]
    return [
        perplexity(thousand[1:] if i == 0 else thousand) for i, thousand in enumerate(thousands)
    ]


def spreads(nll: list[float]) -> dict[str, tuple[float, float]]:
    """Lowest and highest perplexity of a thousand, before and past the trained context."""
    thousands = by_thousand(nll)
    trained = TRAINED_CONTEXT // THOUSAND
    earlier, later = thousands[:trained], thousands[trained:]
    return {"earlier": (min(earlier), max(earlier)), "later": (min(later), max(later))}


def far_over_fresh(far: list[float], fresh: list[float]) -> list[float]:
    """Perplexity of the same text late and early in a stream, by thousand.

    Leaves out the fresh stream's first thousand, which begins without a context.
    """
    late = by_thousand(far)[-len(by_thousand(fresh)) :]
    return [a / b for a, b in zip(late, by_thousand(fresh), strict=True)][1:]


def read(arm: Arm, model: Path, path: Path, fresh: bool) -> list[float]:
    """The arm's figures from `path`, or else from the model, which takes minutes."""
    setup = arm.setup(model)
    if not fresh and path.exists():
        written = json.loads(path.read_text(encoding="utf-8"))
        if written["setup"] == setup:
            console.print(f"{arm.key}: already in {path}")
            nll: list[float] = written["nll"]
            return nll
    nll = [round(value, 4) for value in arm.read(model)]
    results.write(path, "benchmarks.perplexity", {"setup": setup, "nll": nll}, indent=None)
    return nll


def summary(nll: list[float]) -> dict[str, Any]:
    return {
        "perplexity": round(perplexity(nll), 3),
        "by_thousand": [round(value, 3) for value in by_thousand(nll)],
    }


def level(far: list[float], fresh: list[float]) -> dict[str, Any]:
    """Print and return what bears on the claim that quality holds past the trained context."""
    found = spreads(far)
    ratios = far_over_fresh(far, fresh)
    before, past = ("{:.2f} to {:.2f}".format(*found[when]) for when in ("earlier", "later"))
    console.print(f"By thousand: {before} before the trained context ends, {past} past it.")
    console.print(
        f"The same text past it over a stream begun there: {min(ratios):.4f} to {max(ratios):.4f}."
    )
    return {
        **{when: [round(value, 3) for value in bounds] for when, bounds in found.items()},
        "far_over_fresh": [round(ratio, 4) for ratio in ratios],
    }


def show(figures: dict[str, dict[str, Any]]) -> None:
    table = Table("from token", *(key.replace("-", "\n") for key in figures))
    columns = [arm["by_thousand"] for arm in figures.values()]
    for i, row in enumerate(zip_longest(*columns)):
        table.add_row(
            f"{i * THOUSAND:,}", *("" if value is None else f"{value:.2f}" for value in row)
        )
    table.add_section()
    table.add_row("all", *(f"{arm['perplexity']:.2f}" for arm in figures.values()))
    console.print(table)


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--fresh", action="store_true", help="read every arm again")
    options = parser.parse_args()
    model = embedded.path()
    target = results.folder(options)
    nlls = {
        arm.key: read(arm, model, target / "perplexity" / f"{arm.key}.json", options.fresh)
        for arm in (QUICK if options.quick else ARMS)
    }
    figures: dict[str, dict[str, Any]] = {key: summary(nll) for key, nll in nlls.items()}
    show(figures)
    if not options.quick:
        figures["level"] = level(nlls["sink-16000"], nlls["fresh-8000"])
    results.write(target / "perplexity.json", "benchmarks.perplexity", {"arms": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())

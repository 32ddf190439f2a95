"""Token by token on the same text: this project beside attention-sinks and llama.cpp.

attention-sinks is the oracle: one of the first implementations of the paper, in plain PyTorch. Each
peer runs in a virtual environment of its own. llama.cpp computes on the quantised GGUF file that
the checkpoint of the others was widened from, so its likelihoods differ from the first token on;
what its context shift adds shows past the eviction.
An arm is written as soon as it is read, and not read again unless --fresh or its setup changed.
"""

import json
import os
import subprocess
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import cli, results, venvs
from benchmarks.harness.engine import ENVIRONMENT, Engine
from benchmarks.texts.likelihood import perplexity, ratio
from benchmarks.texts.reading import CHUNK, DTYPE, reader
from benchmarks.texts.tokens import book_tokens, novel_tokens
from vllm_sink import embedded

ORACLE = "attention-sinks"
OURS = "vllm_sink"
TEXTS = {"novels": novel_tokens, "opticks": book_tokens}

console = Console()


@dataclass(frozen=True)
class Arm(ABC):
    name: str

    @abstractmethod
    def read(self, tokens: list[int]) -> list[float]:
        """Negative log-likelihood of each token but the first, in nats."""

    @abstractmethod
    def setup(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Ours(Arm):
    """Real vLLM, with this project's settings or, without any, as it comes."""

    sink: dict[str, Any] | None

    def read(self, tokens: list[int]) -> list[float]:
        with reader(embedded.path(), len(tokens), self.sink) as worker:
            return worker.run(Engine.nll, tokens, CHUNK, self.name)

    def setup(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Peer(Arm):
    """One of the guests, run in the environment that holds `package`."""

    script: str
    environment: str
    package: str
    model: Path
    settings: dict[str, int]

    def read(self, tokens: list[int]) -> list[float]:
        request = {"model": str(self.model), "tokens": tokens, **self.settings}
        script = str(venvs.GUESTS / self.script)
        with subprocess.Popen(
            [*venvs.isolated(self.environment), "-W", "ignore", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT},
            # Ctrl-C is for this process; the peer ends as nobody reads any more.
            start_new_session=True,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            with process.stdin as stdin:
                json.dump(request, stdin)
            nll = [float(line) for line in track(process.stdout, self.name, total=len(tokens) - 1)]
        if process.returncode:
            raise cli.BenchmarkError(f"{self.script} failed; its own words are above.")
        return nll

    def setup(self) -> dict[str, Any]:
        return {**asdict(self), "model": self.model.name, "version": self.version()}

    def version(self) -> str:
        asked = f"from importlib.metadata import version; print(version({self.package!r}))"
        command = [*venvs.isolated(self.environment), "-c", asked]
        return subprocess.check_output(command, text=True).strip()


@dataclass(frozen=True)
class Plan:
    """Every arm with a bounded cache has S + W tokens in sight, the current one included."""

    text: str
    tokens: int
    sinks: int
    window: int
    baselines: bool
    """A window without sinks and stock vLLM too."""

    @property
    def cache(self) -> int:
        return self.sinks + self.window

    def arms(self) -> list[Arm]:
        def llamacpp(name: str, discard: int) -> Peer:
            settings = {"sink_tokens": self.sinks, "cache_tokens": self.cache, "discard": discard}
            peer = ("llamacpp_reader.py", "cyllama", "cyllama")
            return Peer(name, *peer, embedded.gguf(), settings)

        # It evicts after the forward pass, so that a query sees itself beside the recent tokens.
        recent = {"sink_tokens": self.sinks, "recent_tokens": self.window - 1}
        peer = ("attention_sinks_reader.py", "attention_sinks", "attention-sinks")
        compared = [
            Peer(ORACLE, *peer, embedded.path(), recent),
            Ours(OURS, {"sink_tokens": self.sinks, "window_tokens": self.window}),
            llamacpp("llama.cpp-one", 1),
            llamacpp("llama.cpp-half", (self.cache - self.sinks) // 2),
        ]
        baselines = [
            Ours("window", {"policy": "window", "window_tokens": self.cache}),
            Ours("dense", None),
        ]
        return [*compared, *baselines] if self.baselines else compared


PLAN = Plan("novels", 1_600, sinks=4, window=509, baselines=True)
QUICK = Plan("opticks", 150, sinks=4, window=61, baselines=False)


def measure(plan: Plan, tokens: list[int], raw: Path, fresh: bool) -> dict[str, list[float]]:
    """Each arm's likelihoods, from the folder `raw` or else from a model, which takes minutes."""
    common = {"dtype": DTYPE, "text": plan.text, "tokens": plan.tokens}
    # All at first: a missing environment should not show after minutes.
    setups = [(arm, {**common, **arm.setup()}) for arm in plan.arms()]
    nlls: dict[str, list[float]] = {}
    for arm, setup in setups:
        path = raw / f"{arm.name}.json"
        read = partial(_read, arm, tokens)
        nlls[arm.name] = results.kept(path, "benchmarks.peers", setup, fresh, read)["nll"]
    return nlls


def _read(arm: Arm, tokens: list[int]) -> dict[str, Any]:
    return {"nll": [round(nll, 6) for nll in arm.read(tokens)]}


def difference(nll: list[float], oracle: list[float], past: int) -> dict[str, Any]:
    """The largest of any token, in nats, before the first eviction and from `past` on."""
    apart = [abs(a - b) for a, b in zip(nll, oracle, strict=True)]
    return {
        "before_eviction": round(max(apart[:past]), 6),
        "past_eviction": round(max(apart[past:]), 6),
        "at_token": 1 + apart.index(max(apart)),
    }


def figures(plan: Plan, nlls: dict[str, list[float]]) -> dict[str, Any]:
    """Perplexity of the tokens past the first eviction, and what sets an arm apart."""
    oracle, past = nlls[ORACLE], plan.cache
    return {
        name: {
            "perplexity": round(perplexity(nll[past:]), 3),
            "over_oracle": ratio(nll[past:], oracle[past:]),
            "difference": difference(nll, oracle, past),
        }
        for name, nll in nlls.items()
    }


def show(plan: Plan, arms: dict[str, Any]) -> None:
    table = Table("", "perplexity", "ratio", "before", "past", "at token")
    for name, arm in arms.items():
        apart = arm["difference"]
        table.add_row(
            name,
            f"{arm['perplexity']:.3f}",
            f"{arm['over_oracle']['ratio']:.4f}",
            f"{apart['before_eviction']:.6f}",
            f"{apart['past_eviction']:.6f}",
            f"{apart['at_token']:,}",
        )
    console.print(table)
    console.print(
        f"S = {plan.sinks}, W = {plan.window}. Perplexity of tokens {plan.cache + 1:,} to "
        f"{plan.tokens - 1:,}, and its ratio to that of {ORACLE}. The largest difference of a "
        f"token's log-likelihood from that of {ORACLE}, before and past the first eviction."
    )


def main() -> None:
    options = cli.parser(__doc__, resumable=True).parse_args()
    plan = QUICK if options.quick else PLAN
    model = embedded.path()
    tokens = TEXTS[plan.text](model, plan.tokens)
    target = cli.folder(options)
    arms = figures(plan, measure(plan, tokens, target / "peers", options.fresh))
    show(plan, arms)
    setup = {"model": model.name, "dtype": DTYPE, **asdict(plan)}
    versions = {arm.package: arm.version() for arm in plan.arms() if isinstance(arm, Peer)}
    record = {"setup": setup, "peer_versions": versions, "arms": arms}
    results.write(target / "peers.json", "benchmarks.peers", record)


if __name__ == "__main__":
    cli.run(main)

"""The GPU kernel beside the memory's bandwidth, a window without sinks, and vLLM's own kernels.

Attention of one layer over random bfloat16. Times are of CUDA graphs, so not of Python, with a cold
L2 cache, by CUDA events; arms take turns. What an arm's graph writes is first compared with
`ReferenceAttention`.

decode: streams far past S + W; vLLM's kernels read whole streams of S + W tokens
position: the same step near the start of streams and far down
prefill: a chunk of one stream, far past S + W, and a whole stream; vLLM's sliding window is of W
"""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from benchmarks.harness import cli, results
from benchmarks.harness.attention_arms import (
    BLOCK,
    MODELS,
    NEAR,
    SINKS,
    Call,
    Kernel,
    Point,
    Step,
    arms,
    verify,
)

FAR = 2**22
PAST = 9
"""Tokens past the end of a block, so that windows begin and end within blocks."""
FREE_SHARE = 0.4
"""Of the free memory, for a cache: the reference needs some, and a second cache."""
COPIED_BYTES = 2**31
RIVALS = ("vllm", "flash")
RATIOS = (
    ("floor", "sinks"),
    ("sinks", "window"),
    ("sinks", "vllm"),
    ("sinks", "flash"),
    ("far", "near"),
)


@dataclass(frozen=True)
class Plan:
    models: tuple[str, ...] = tuple(MODELS)
    caches: tuple[int, ...] = (512, 2048, 4096)
    """S + W of decode."""
    streams: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    chunks: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Tokens of a prefill."""
    rounds: int = 5
    """Turns of each arm."""
    turn_ms: int = 100

    def points(self) -> list[Point]:
        decode = [
            Point("decode", model, cache, 2 * cache + PAST, streams)
            for model, cache, streams in product(self.models, self.caches, self.streams)
        ]
        position = [Point("position", model, 2048, FAR, streams=32) for model in self.models]
        chunks = [
            Point("prefill", model, 2048, 2 * 2048 + PAST + chunk, queries=chunk)
            for model, chunk in product(self.models, self.chunks)
        ]
        whole = [
            Point("prefill", model, 2 * length, length, queries=length)
            for model, length in product(self.models, self.chunks)
        ]
        return [*decode, *position, *chunks, *whole]


QUICK = Plan(("Llama-3-8B",), (512,), (1, 8), (2048,), rounds=2, turn_ms=20)


class Captured:
    """A call as a CUDA graph."""

    def __init__(self, call: Call) -> None:
        self.call = call  # holds the memory that the graph works on
        call()  # compiles
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            call()

    def milliseconds(self, turn_ms: int) -> float:
        from triton.testing import do_bench

        return float(do_bench(self.graph.replay, rep=turn_ms, return_mode="median"))


def verified(where: str, kernel: Kernel, given: Step) -> Captured:
    out = torch.empty_like(given.query)
    captured = Captured(kernel(given, out))
    out.fill_(torch.nan)
    captured.graph.replay()
    verify(where, given, out)
    return captured


def ceilings(turn_ms: int) -> dict[str, float]:
    """Of this GPU: what a large copy reads and writes a second; a graph of next to nothing."""
    source = torch.randn(COPIED_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = Captured(lambda: target.copy_(source))
    one = torch.zeros(1, device="cuda")
    return {
        "copy_bytes_a_second": 2 * COPIED_BYTES / copy.milliseconds(turn_ms) * 1000,
        "launch_ms": round(Captured(lambda: one.add_(1)).milliseconds(turn_ms), 5),
    }


def skipped(point: Point, free_bytes: int) -> dict[str, Any] | None:
    """A point whose cache is too large for its share of the free memory."""
    needed = torch.Size(point.storage_shape).numel() * torch.bfloat16.itemsize
    if needed <= FREE_SHARE * free_bytes:
        return None
    free = f"{FREE_SHARE:.0%} of the {free_bytes / 2**30:.1f} that are free"
    return {**asdict(point), "skipped": f"its cache takes {needed / 2**30:.1f} GiB, over {free}"}


def measure(point: Point, plan: Plan, copy_bytes_a_second: float) -> dict[str, Any]:
    torch.cuda.empty_cache()
    if too_large := skipped(point, torch.cuda.mem_get_info()[0]):
        return too_large
    ready, left_out = {}, {}
    for name, (kernel, given) in arms(point, "cuda").items():
        try:
            ready[name] = verified(f"{point}, {name}", kernel, given)
        except Exception as error:
            if name not in RIVALS:
                raise
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    rounds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(plan.rounds):
        for name, captured in ready.items():
            rounds[name].append(captured.milliseconds(plan.turn_ms))
    return summary(point, rounds, copy_bytes_a_second) | {"left_out": left_out}


def summary(
    point: Point, rounds: dict[str, list[float]], copy_bytes_a_second: float
) -> dict[str, Any]:
    """Milliseconds of each arm, and ratios of turns side by side.

    The floor of decode is the bytes it must move at the bandwidth of a copy.
    """
    if point.kind == "decode":
        floor = 1000 * point.bytes_at_least / copy_bytes_a_second
        rounds = rounds | {"floor": [floor] * len(rounds["sinks"])}
    return {
        **asdict(point),
        "ms": {arm: results.spread(turns, 5) for arm, turns in rounds.items()},
        "ratios": {
            f"{a}/{b}": results.spread([x / y for x, y in zip(rounds[a], rounds[b], strict=True)])
            for a, b in RATIOS
            if a in rounds and b in rounds
        },
    }


def line(point: dict[str, Any]) -> str:
    """In plain text, so that machines with torch and triton alone can run this."""
    what = "{kind}, {model}, S + W = {cache:,}, {streams} x {queries:,} to token {length:,}"
    ms = [f"{arm} {turns['median']:.4f} ms" for arm, turns in point.get("ms", {}).items()]
    ratios = [f"{arms} {x['median']:.3f}" for arms, x in point.get("ratios", {}).items()]
    return f"{what.format(**point)}: {', '.join([*ms, *ratios]) or point['skipped']}"


def main() -> None:
    options = cli.parser(__doc__, resumable=True).parse_args()
    if not torch.cuda.is_available():
        raise cli.BenchmarkError("The GPU kernel cannot be timed: torch finds no CUDA GPU here.")
    plan = QUICK if options.quick else Plan()
    path = cli.folder(options) / "attention.json"
    setup = {
        "gpu": torch.cuda.get_device_name(),
        "dtype": "bfloat16",
        "sinks": SINKS,
        "block": BLOCK,
        "layout": "tokens ahead of heads",
        "near": NEAR,
        "shapes": {model: asdict(MODELS[model]) for model in plan.models},
        **asdict(plan),
    }
    figures = results.stored(path, setup, options.fresh)
    figures = figures or {"setup": setup, **ceilings(plan.turn_ms), "points": []}
    points = figures["points"]
    for point in points:
        print(line(point))
    for point in plan.points()[len(points) :]:
        points.append(measure(point, plan, figures["copy_bytes_a_second"]))
        results.write(path, "benchmarks.attention", figures)
        print(line(points[-1]))
    for arm, why in sorted({why for point in points for why in point.get("left_out", {}).items()}):
        print(f"{arm} was left out: {why}")


if __name__ == "__main__":
    cli.run(main)

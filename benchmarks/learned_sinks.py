"""What learned sinks cost a decode step's attention on this machine's CPU, beside none.

The same step is taken with and without them, in turns: 8 streams past S + W = 1024, in the shape of
one layer of SmolLM2-135M, on one core.
"""

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness import cli, results
from benchmarks.harness.engine import pin
from vllm_sink import cpu
from vllm_sink.attention.cpu import cpu_attention
from vllm_sink.attention.interface import Batch, Scoring, SinkTurn
from vllm_sink.geometry import Geometry, cdiv
from vllm_sink.rotary import cos_sin


@dataclass(frozen=True)
class Plan:
    rounds: int
    steps: int
    """Of each arm in a round, of which the fastest counts."""
    streams: int = 8
    heads: int = 9
    kv_heads: int = 3
    head_size: int = 64
    block_size: int = 128
    sinks: int = 4
    window: int = 1020
    length: int = 2048


PLAN = Plan(rounds=300, steps=10)
QUICK = Plan(rounds=3, steps=2)


def measure(plan: Plan) -> dict[str, Any]:
    pin()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    attention, dtype = cpu_attention(), getattr(torch, cpu.fast_dtype())
    blocks = cdiv(plan.length, plan.block_size)
    storage = torch.randn(
        plan.streams * blocks, plan.kv_heads, plan.block_size, 2 * plan.head_size, dtype=dtype
    )
    cache, geometry = attention.as_cache(storage), Geometry(plan.sinks, plan.window)
    batch = Batch(
        torch.arange(plan.streams + 1, dtype=torch.int32),
        torch.full((plan.streams,), plan.length, dtype=torch.int32),
        torch.arange(plan.streams * blocks, dtype=torch.int32).view(plan.streams, blocks),
        max_query_len=1,
    )
    inv_freq = 10000.0 ** (-torch.arange(0, plan.head_size, 2) / plan.head_size)
    evicted = torch.full((plan.streams,), geometry.evicted(plan.length - 1))
    turn = SinkTurn(cos_sin(-evicted, inv_freq), is_neox_style=True)
    query = torch.randn(plan.streams, plan.heads, plan.head_size, dtype=dtype)
    out, scale = torch.empty_like(query), plan.head_size**-0.5

    def fastest(scoring: Scoring) -> float:
        def once() -> float:
            start = time.perf_counter()
            attention.attend(query, cache, batch, geometry, scoring, turn, out)
            return time.perf_counter() - start

        return min(once() for _ in range(plan.steps))

    without = Scoring(scale)
    learned = Scoring(scale, sink_logits=torch.randn(plan.heads))
    taken = [(fastest(without), fastest(learned)) for _ in range(plan.rounds)]
    return {
        "step_us": round(1e6 * median(one for one, _ in taken), 1),
        "ratio": results.spread([other / one for one, other in taken]),
    }


def main() -> None:
    options = cli.parser(__doc__).parse_args()
    plan = QUICK if options.quick else PLAN
    found = measure(plan)
    setup = {"dtype": cpu.fast_dtype(), **asdict(plan)}
    path = cli.folder(options) / "learned_sinks.json"
    results.write(path, "benchmarks.learned_sinks", {"setup": setup, **found})
    Console().print(
        f"A step takes {found['step_us']} µs; with learned sinks {found['ratio']['median']} times."
    )


if __name__ == "__main__":
    cli.run(main)

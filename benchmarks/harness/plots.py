"""A picture of each benchmark's figures."""

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

Record = dict[str, Any]


def perplexity(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    for name in ("dense", "full", "window", "sink-4-stream-positions", "sink-4"):
        if name in record["arms"]:
            thousands = record["arms"][name]["by_thousand"]
            axes.plot(range(len(thousands)), thousands, label=name, lw=1.4)
    axes.set(xlabel="thousand tokens", ylabel="perplexity", yscale="log")
    axes.legend()


def recompute(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    caches = [row["cache"] for row in record["rows"]]
    for arm, style in (("recompute", "o-"), ("ours", "s-")):
        medians = [row[f"{arm}_ms"]["median"] for row in record["rows"]]
        floors = [row[f"{arm}_floor_ms"] for row in record["rows"]]
        (line,) = axes.plot(caches, medians, style, label=arm)
        axes.plot(caches, floors, ":", color=line.get_color(), label=f"{arm}, floor")
    axes.set(xlabel="S + W", ylabel="ms a token", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend()


def position(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    pairs = record["pairs"]
    medians = [pair["ratio"]["median"] for pair in pairs]
    axes.plot([pair["position"] for pair in pairs], medians, "o-", label="step time")
    blocks = [max(pair["far"]["kv_blocks"]) / max(pair["near"]["kv_blocks"]) for pair in pairs]
    axes.plot([pair["position"] for pair in pairs], blocks, "s--", label="KV blocks")
    axes.set(
        xlabel="position in the stream",
        ylabel=f"over position {record['setup']['near']:,}",
        xscale="log",
        ylim=(0, 2),
    )
    axes.legend()


def throughput(figure: Figure, record: Record) -> None:
    rate, wait = figure.subplots(1, 2)
    for name, arm in record["arms"].items():
        points = [point for point in arm["points"] if point["output_tokens_s"]]
        clients = [point["clients"] for point in points]
        rate.plot(clients, [point["output_tokens_s"] for point in points], "o-", label=name)
        wait.plot(clients, [point["inter_token_ms"]["p95"] for point in points], "o-", label=name)
    rate.set(xlabel="clients", ylabel="output tokens/s")
    wait.set(xlabel="clients", ylabel="mean between tokens, p95 of streams, ms", yscale="log")
    for axes in (rate, wait):
        axes.set_xscale("log", base=2)
    rate.legend()


def capacity(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    held = {"sinks": record["sink"]["streaming"]}
    held |= {f"dense {int(c):,}": n for c, n in record["dense_by_blocks"].items()}
    bars = axes.bar(list(held), list(held.values()))
    axes.bar_label(bars, fmt="{:g}")
    axes.set(ylabel="streams in the pool", yscale="log")


def streameval(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    distances = record["setup"]["distances"]
    for name, cells in record["arms"].items():
        shares = [cell["accuracy"] for cell in cells]
        low, high = zip(*(cell["interval"] for cell in cells), strict=True)
        (line,) = axes.plot(distances, shares, "o-", label=name)
        axes.fill_between(distances, low, high, alpha=0.15, color=line.get_color())
    axes.axvline(record["in_sight"], ls=":", color="black", label="end of the sinks' window")
    axes.axhline(record["chance"], lw=0.8, color="gray", label="chance")
    axes.set(xlabel="answered so many tokens ago", ylabel="right", ylim=(-0.02, 1))
    axes.legend()


DRAW: dict[str, Callable[[Figure, Record], None]] = {
    "perplexity": perplexity,
    "recompute": recompute,
    "position": position,
    "throughput": throughput,
    "capacity": capacity,
    "streameval": streameval,
}

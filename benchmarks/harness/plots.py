"""A picture of each benchmark's figures."""

from collections.abc import Callable, Collection
from itertools import chain, groupby, pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from benchmarks.harness import names
from benchmarks.harness.endless import CLOCKS
from benchmarks.harness.results import spread

Record = dict[str, Any]
Style = dict[str, Any]

# Broad, pale and lowest, so that an arm which does the same is seen on top of it.
OURS: Style = {"color": "C0", "lw": 6, "alpha": 0.4, "marker": "o", "ms": 10}
STYLES: dict[str, Style] = {
    "sink": OURS,
    "sink-4": OURS,
    "window": {"color": "C1", "ls": "--", "marker": "s", "ms": 5},
    "full": {"color": "C5", "marker": "D", "ms": 5},
    "dense": {"color": "C2", "ls": "--", "marker": "^", "ms": 11, "mfc": "none"},
    "recompute": {"color": "C3", "marker": "v", "ms": 5},
    "sink-4-stream-positions": {"color": "C3", "ls": ":", "marker": "x", "ms": 5},
    "llamacpp": {"color": "C4", "ls": "-.", "marker": "*", "ms": 7},
    "session": {**OURS, "ms": 7},
    "session-all": {"color": "C1", "marker": "s", "ms": 3},
}
PROCESSES: dict[str, Style] = {
    "engine": {"color": "C0", "label": "engine"},
    "front_end": {"color": "C1", "label": "front end"},
}
MILLION = 1_000_000


def perplexity(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    for arm, style in STYLES.items():
        if arm in record["arms"]:
            thousands = record["arms"][arm]["by_thousand"]
            axes.plot(range(len(thousands)), thousands, label=names.of(arm), **style)
    axes.set(xlabel="from token, thousands", ylabel="perplexity of a thousand tokens", yscale="log")
    plain(axes.yaxis)
    setup = record["setup"]
    figure.suptitle(f"{setup['text']}, S + W = {setup['recompute']['cache']:,}")
    legend(figure, axes)


def compaction(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    seen, plan = record["quality"], record["setup"]["quality"]
    places = [point["tokens"] for point in seen["points"]]
    ratio, error = seen["ratio"]["ratio"], seen["ratio"]["standard_error"]
    axes.plot(places, [point["ratio"] for point in seen["points"]], "o", label="one compaction")
    axes.axhline(ratio, label="all")
    axes.axhspan(ratio - error, ratio + error, alpha=0.2, label="standard error")
    axes.axhline(1, ls=":", color="black")
    axes.set(xlabel="tokens of the stream at the compaction", ylabel="perplexity over uncompacted")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    cache = plan["buffer"]["sinks"] + plan["buffer"]["window"]
    figure.suptitle(f"The {plan['after']} tokens after a compaction, S + W = {cache:,}")
    legend(figure, axes)


def recompute(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    rows = record["rows"]
    caches = [row["cache"] for row in rows]
    for key, arm in (("ours", "sink"), ("recompute", "recompute")):
        spreads(axes, arm, caches, [row[f"{key}_ms"] for row in rows])
        floors = [row[f"{key}_floor_ms"] for row in rows]
        label, color = f"{names.of(arm)}, floor", STYLES[arm]["color"]
        axes.plot(caches, floors, ":", color=color, label=label)
    axes.set(xlabel="S + W, tokens", ylabel="ms a token", xscale="log", yscale="log")
    plain(axes.xaxis, caches)
    plain(axes.yaxis)
    figure.suptitle("A token's latency, one stream on one core; bars: minimum to maximum")
    legend(figure, axes)


def position(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    pairs, near = record["pairs"], record["setup"]["near"]
    positions = [pair["position"] for pair in pairs]
    spreads(axes, "sink", positions, [pair["ratio"] for pair in pairs], "time of a step")
    blocks = [max(pair["far"]["kv_blocks"]) / max(pair["near"]["kv_blocks"]) for pair in pairs]
    axes.plot(positions, blocks, "s--", color="C1", label="KV blocks")
    axes.set(
        xlabel="position in the stream, tokens",
        ylabel=f"ratio to position {near:,}",
        xscale="log",
        ylim=(0, 2),
    )
    plain(axes.xaxis, positions)
    figure.suptitle("Sinks far down a stream; bars: minimum to maximum")
    legend(figure, axes)


def endless(figure: Figure, record: Record) -> None:
    time, memory = figure.subplots(1, 2)
    clocks: dict[str, Style] = {
        "wall": {"color": "gray", "label": "wall clock"},
        **{f"{name}_cpu": style for name, style in PROCESSES.items()},
    }
    for segment, samples in enumerate(record["segments"]):
        once = {"label": None} if segment else {}
        positions = [sample["position"] / MILLION for sample in samples]
        for name, style in clocks.items():
            stretches = pairwise(CLOCKS[name](sample) for sample in samples)
            taken = [1000 * (b - a) / record["setup"]["every"] for a, b in stretches]
            time.plot(positions[1:], taken, **style | once)
        for name, style in PROCESSES.items():
            held = [sample[name]["rss_mib"] for sample in samples]
            memory.plot(positions, held, **style | once)
    for axes in (time, memory):
        axes.set(xlabel="position in the stream, million tokens", ylim=(0, None))
    time.set(ylabel="ms a token: wall clock, CPU time")
    memory.set(ylabel="resident memory, MiB")
    figure.suptitle("One request to a real server")
    legend(figure, time)


def throughput(figure: Figure, record: Record) -> None:
    rate, wait = figure.subplots(1, 2)
    every: set[int] = set()
    for arm, measured in record["arms"].items():
        points = [point for point in measured["points"] if point["output_tokens_s"]]
        turns = [[*turn] for _, turn in groupby(points, lambda point: point["clients"])]
        clients = [turn[0]["clients"] for turn in turns]
        rates = [spread([point["output_tokens_s"] for point in turn]) for turn in turns]
        waits = [spread([point["inter_token_ms"]["p95"] for point in turn]) for turn in turns]
        spreads(rate, arm, clients, rates)
        spreads(wait, arm, clients, waits)
        every.update(clients)
    for axes in (rate, wait):
        axes.set(xlabel="clients at once", xscale="log")
        plain(axes.xaxis, sorted(every))
    rate.set(ylabel="tokens/s of all clients", ylim=(0, None))
    wait.set(ylabel="ms between tokens, p95 of streams", yscale="log")
    plain(wait.yaxis)
    sizes = record["setup"]["geometry"]
    figure.suptitle(
        f"Many clients, S + W = {sizes['sinks'] + sizes['window']:,}; bars: minimum to maximum"
    )
    legend(figure, rate)


def sessions(figure: Figure, record: Record) -> None:
    turns, places = figure.subplots(1, 2, width_ratios=(3, 2))
    for arm, seen in record["histories"]["arms"].items():
        firsts = [turn["first_ms"] / 1000 for turn in seen["turns"]]
        turns.plot(range(1, len(firsts) + 1), firsts, label=names.of(arm), **STYLES[arm])
    turns.set(xlabel="turn of a conversation", ylabel="seconds to the first token", yscale="log")
    plain(turns.yaxis)
    rows = record["position"]
    kinds = [f"{row['kind']}\n{row['buffered']:,}" for row in rows]
    for index, position in enumerate(record["setup"]["position"]["positions"]):
        medians = [row["places"][index]["first_ms"]["median"] for row in rows]
        at = [place + (index - 0.5) * 0.4 for place in range(len(rows))]
        places.bar(at, medians, 0.4, color=f"C{index + 7}", label=f"position {position:,}")
    places.set_xticks(range(len(rows)), kinds)
    places.set(xlabel="found cached or not; tokens held", ylabel="ms to the first, tiny model")
    figure.suptitle("A turn's first token: by the length of its history, and far down a session")
    legend(figure, turns, places)


def replicas(figure: Figure, record: Record) -> None:
    share, wait = figure.subplots(1, 2)
    rows = record["throughput"]["rows"]
    for index, arm in enumerate(rows[0]["arms"]):
        ratios = [row["arms"][arm]["over_one"] for row in rows]
        medians = [ratio["median"] for ratio in ratios]
        ends = [
            [ratio["median"] - ratio["min"] for ratio in ratios],
            [ratio["max"] - ratio["median"] for ratio in ratios],
        ]
        at = [place + (index - 1) * 0.27 for place in range(len(rows))]
        share.bar(
            at, medians, 0.27, yerr=ends, capsize=3, color=f"C{index + 6}", label=names.of(arm)
        )
    share.set_xticks(range(len(rows)), [row["work"] for row in rows])
    share.set(xlabel="work of sessions at once", ylabel="tokens/s over one replica's")
    for row, style in zip(record["affinity"], ("-", "--"), strict=False):
        for (arm, seen), color in zip(row["arms"].items(), ("C0", "C3"), strict=True):
            firsts = seen["by_turn"]["first_ms"]
            label = f"{names.of(arm)}, of {row['sessions']}"
            wait.plot(
                range(1, len(firsts) + 1), firsts, style, color=color, marker=".", label=label
            )
    wait.set(xlabel="turn of a session", ylabel="ms to the first token", ylim=(0, None))
    figure.suptitle("Replicas on two cores; bars: minimum to maximum")
    legend(figure, share, wait)


def scale(figure: Figure, record: Record) -> None:
    fullest, writes = figure.subplots(1, 2)
    setup, rows, redis = record["setup"], record["fleets"], record["redis"]
    replicas = [row["replicas"] for row in rows]
    for shared, color in (("sessions", "C0"), ("turns", "C1")):
        for nodes, style in zip(setup["virtual_nodes"], ("-", "--"), strict=False):
            seen = [row["balance"][str(nodes)][shared]["max"] for row in rows]
            low, median, high = ([each[name] for each in seen] for name in ("min", "median", "max"))
            label = f"{shared}, {nodes:,} nodes"
            fullest.plot(replicas, median, style, color=color, marker=".", label=label)
            fullest.fill_between(replicas, low, high, alpha=0.12, color=color)
    pooled = [count * setup["pooled"] / setup["think_s"] for count in replicas]
    writes.plot(replicas, pooled, color="C2", marker=".", label="all in pools speak")
    writes.axhline(redis["turns_s"], ls=":", color="black", label="all speak")
    rates = [row["turns_s"] for row in redis["rows"]]
    writes.axhspan(min(rates), max(rates), alpha=0.3, color="C3", label="one Redis")
    decades = [10**power for power in range(5)]
    for axes in (fullest, writes):
        axes.set(xlabel="replicas", xscale="log")
        plain(axes.xaxis, decades)
    fullest.set(ylabel="the fullest replica over the mean")
    writes.set(ylabel="turns/s, each a write", yscale="log")
    plain(writes.yaxis, decades)
    figure.suptitle(
        f"Simulated: {setup['sessions']:,} sessions, a turn every {setup['think_s']:g} s; "
        "shaded: minimum to maximum"
    )
    legend(figure, fullest, writes)


def capacity(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    held = {f"{names.of('sink')},\nany length": record["sink"]["streaming"]}
    for context, streams in record["dense_by_blocks"].items():
        held[f"{names.of('dense')},\n{int(context):,} tokens"] = streams
    colors = [STYLES[arm]["color"] for arm in ("sink", *["dense"] * (len(held) - 1))]
    bars = axes.bar(list(held), list(held.values()), color=colors)
    axes.bar_label(bars, fmt="{:g}")
    axes.set(ylabel="streams", yscale="log")
    axes.margins(y=0.1)
    plain(axes.yaxis)
    setup = record["setup"]
    figure.suptitle(
        f"Streams in a KV pool of {record['pool_tokens']:,} tokens, "
        f"S + W = {setup['sink_tokens'] + setup['window_tokens']:,}"
    )


def streameval(figure: Figure, record: Record) -> None:
    axes = figure.subplots()
    setup = record["setup"]
    for arm, cells in record["arms"].items():
        style = STYLES[arm]
        right = [100 * cell["accuracy"] for cell in cells]
        low, high = zip(*([100 * x for x in cell["interval"]] for cell in cells), strict=True)
        axes.plot(setup["distances"], right, label=names.of(arm), **style)
        axes.fill_between(setup["distances"], low, high, alpha=0.12, color=style["color"])
    axes.axvline(record["in_sight"], ls=":", color="black", label="end of the sinks' window")
    axes.axhline(100 * record["chance"], lw=0.8, color="gray", label="chance")
    axes.set(xlabel="tokens since the answer", ylabel="right answers, %", ylim=(-3, 100))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(f"What is remembered, S + W = {setup['cache']:,}; shaded: 95 % intervals")
    legend(figure, axes)


def spreads(
    axes: Axes,
    arm: str,
    at: list[int],
    seen: list[dict[str, float]],
    label: str | None = None,
) -> None:
    """A line through the medians, each with its minimum and maximum."""
    medians = [one["median"] for one in seen]
    below = [one["median"] - one["min"] for one in seen]
    above = [one["max"] - one["median"] for one in seen]
    bars = axes.errorbar(at, medians, (below, above), capsize=4, barsabove=True, **STYLES[arm])
    # Not on the bars, which a legend lists behind all lines.
    bars.lines[0].set_label(label or names.of(arm))


def plain(axis: Axis, measured: Collection[float] = ()) -> None:
    """Numbers without exponents on a logarithmic axis: those measured, or else 1, 2, 5, 10, ..."""
    axis.set_major_locator(FixedLocator([*measured]) if measured else LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,.10g}")


def legend(figure: Figure, *axes: Axes) -> None:
    """Below, where it hides nothing."""
    both = [one.get_legend_handles_labels() for one in axes]
    lines, labels = ([*chain(*parts)] for parts in zip(*both, strict=True))
    figure.legend(
        lines,
        labels,
        loc="outside lower center",
        ncols=-(-len(labels) // len(axes)),
        columnspacing=1.2,
        frameon=False,
    )


DRAW: dict[str, Callable[[Figure, Record], None]] = {
    "perplexity": perplexity,
    "compaction": compaction,
    "recompute": recompute,
    "position": position,
    "endless": endless,
    "throughput": throughput,
    "capacity": capacity,
    "sessions": sessions,
    "replicas": replicas,
    "scale": scale,
    "streameval": streameval,
}

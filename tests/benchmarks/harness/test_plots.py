from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import plots


def measured(*rates: float) -> dict[str, Any]:
    """An arm with one client, then with 1,024 in every other turn."""
    clients = [1, *[1024] * (len(rates) - 1)]
    return {
        "points": [
            {"clients": count, "output_tokens_s": rate, "inter_token_ms": {"p95": 1000 / rate}}
            for count, rate in zip(clients, rates, strict=True)
        ]
    }


def test_rounds_are_one_point_and_clients_plain_numbers() -> None:
    arms = {"sink": measured(1.0, 4.0, 9.0, 5.0), "window": measured(2.0, 6.0, 6.0, 7.0)}
    figure = Figure()
    record = {"setup": {"geometry": {"sinks": 4, "window": 252}}, "arms": arms}
    plots.throughput(figure, record)
    figure.canvas.draw()
    for axes in figure.axes:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "1,024"]
        lines, names = axes.get_legend_handles_labels()
        assert names == ["sinks", "window alone"]
        assert all([*line.get_xdata()] == [1, 1024] for line in lines)
    rates = [[*line.get_ydata()] for line in figure.axes[0].get_legend_handles_labels()[0]]
    assert rates == [[1.0, 5.0], [2.0, 6.0]]


def seen(position: int, seconds: float) -> dict[str, Any]:
    engine, front_end = ({"cpu_s": seconds / 2, "rss_mib": mib} for mib in (900.0, 300.0))
    return {"position": position, "seconds": seconds, "engine": engine, "front_end": front_end}


def test_servers_that_go_on_with_a_stream_have_one_name_in_the_legend() -> None:
    segments = [[seen(1000, 1.0), seen(2000, 3.0)], [seen(3000, 1.0), seen(4000, 4.0)]]
    figure = Figure()
    plots.endless(figure, {"setup": {"every": 1000}, "segments": segments})
    time, memory = figure.axes
    assert time.get_legend_handles_labels()[1] == ["wall clock", "engine", "front end"]
    assert [[*line.get_ydata()] for line in time.lines] == [
        [2.0],
        [1.0],
        [1.0],
        [3.0],
        [1.5],
        [1.5],
    ]
    assert [[*line.get_xdata()] for line in memory.lines[::2]] == [[0.001, 0.002], [0.003, 0.004]]


def test_the_ratio_of_all_compactions_lies_in_its_band() -> None:
    points = [{"tokens": 16, "ratio": 0.9}, {"tokens": 24, "ratio": 1.1}]
    overall = {"ratio": 0.99, "standard_error": 0.02}
    reading = {"buffer": {"sinks": 2, "window": 6, "mark": 16}, "after": 4}
    record = {
        "setup": {"quality": reading},
        "quality": {"points": points, "ratio": overall},
    }
    figure = Figure()
    plots.compaction(figure, record)
    (axes,) = figure.axes
    each, every, band = axes.get_legend_handles_labels()[0]
    assert [[*each.get_xdata()], [*each.get_ydata()]] == [[16, 24], [0.9, 1.1]]
    assert set(every.get_ydata()) == {0.99}
    assert band.get_extents().height > 0


def test_conversations_end_where_a_server_refuses_and_places_stand_side_by_side() -> None:
    def place(median: float) -> dict[str, Any]:
        return {"first_ms": {"median": median}}

    def arm(*first_ms: float) -> dict[str, Any]:
        return {"turns": [{"first_ms": each} for each in first_ms]}

    record = {
        "setup": {"position": {"positions": [10, 2000]}},
        "histories": {"arms": {"session": arm(900, 800, 900), "dense": arm(1000, 2000)}},
        "position": [{"kind": "hit", "buffered": 1024, "places": [place(3.0), place(4.0)]}],
    }
    figure = Figure()
    plots.sessions(figure, record)
    figure.canvas.draw()
    turns, places = figure.axes
    lines, labels = turns.get_legend_handles_labels()
    assert labels == ["session, new messages alone", "stock vLLM"]
    assert [[*line.get_xdata()] for line in lines] == [[1, 2, 3], [1, 2]]
    assert [bar.get_height() for bar in places.patches] == [3.0, 4.0]
    assert [tick.get_text() for tick in places.get_xticklabels()] == ["hit\n1,024"]
    assert places.get_legend_handles_labels()[1] == ["position 10", "position 2,000"]


def test_fleets_stand_beside_what_one_redis_takes() -> None:
    def fleet(replicas: int, fullest: float) -> dict[str, Any]:
        over_mean = {"max": {"min": 1.0, "median": fullest, "max": 3.0}}
        return {
            "replicas": replicas,
            "balance": {"100": {"sessions": over_mean, "turns": over_mean}},
        }

    setup = {"virtual_nodes": [100], "sessions": 5000, "pooled": 30, "think_s": 60}
    redis = {"turns_s": 80, "rows": [{"turns_s": 4.0}, {"turns_s": 8.0}]}
    figure = Figure()
    record = {"setup": setup, "fleets": [fleet(1, 1.0), fleet(10, 1.5)], "redis": redis}
    plots.scale(figure, record)
    fullest, writes = figure.axes
    assert fullest.get_legend_handles_labels()[1] == ["sessions, 100 nodes", "turns, 100 nodes"]
    assert [[*line.get_ydata()] for line in fullest.lines] == [[1.0, 1.5]] * 2
    assert [[*line.get_ydata()] for line in writes.lines] == [[0.5, 5.0], [80, 80]]
    (band,) = writes.patches
    assert (band.get_y(), band.get_height()) == (4.0, 4.0)

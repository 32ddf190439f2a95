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

"""All results on one page: README.md and plots, beside the JSON files that they are made from."""

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.harness import cli, names, plots
from benchmarks.texts import paper

TEMPLATE = "report.md.jinja"
NAMES = (
    "attention",
    "capacity",
    "compaction",
    "endless",
    "learned_sinks",
    "peers",
    "perplexity",
    "position",
    "recompute",
    "replicas",
    "scale",
    "sessions",
    "speed",
    "streameval",
    "throughput",
)


def gather(folder: Path) -> dict[str, Any]:
    """Each benchmark's record, None where there is none.

    Raises:
        BenchmarkError: there is none at all.
    """
    paths = {name: folder / f"{name}.json" for name in NAMES}
    records = {
        name: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        for name, path in paths.items()
    }
    if not any(records.values()):
        raise cli.BenchmarkError(f"No results in {folder}: run `python -m benchmarks.perplexity`.")
    if perplexity := records["perplexity"]:
        perplexity["tokens"] = {arm["name"]: arm["tokens"] for arm in perplexity["setup"]["arms"]}
        columns = [arm["by_thousand"] for arm in perplexity["arms"].values()]
        perplexity["rows"] = list(zip_longest(*columns))
    return records


def draw(records: dict[str, Any], folder: Path) -> None:
    for name, plot in plots.DRAW.items():
        if records[name]:
            figure = Figure(figsize=(8, 4), layout="constrained")
            plot(figure, records[name])
            figure.savefig(folder / f"{name}.png", dpi=110)


def page(records: dict[str, Any]) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined
    )
    templates.filters["arm"] = names.of
    return templates.get_template(TEMPLATE).render(**records, paper=paper)


def main() -> None:
    folder = cli.folder(cli.parser(__doc__).parse_args())
    records = gather(folder)
    draw(records, folder)
    (folder / "README.md").write_text(page(records), encoding="utf-8")
    Console().print(f"{folder / 'README.md'}")


if __name__ == "__main__":
    cli.run(main)

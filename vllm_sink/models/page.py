"""The table of architectures, as Markdown."""

from typing import Any

from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

from vllm_sink.models.tiny import RECIPES

TOLERANCE = 1e-4
"""Of a log-probability, in float32."""


def is_right(found: dict[str, Any]) -> bool:
    return found.get("error") is not None and found["error"] <= TOLERANCE


def of(record: dict[str, Any]) -> str:
    found = record["found"]
    right = [name for name in found if is_right(found[name])]
    refused = [name for name in found if "refused" in found[name]]
    faults = [name for name in found if "fault" in found[name]]
    wrong = [name for name in found if name not in {*right, *refused, *faults}]
    untried = sorted(_TEXT_GENERATION_MODELS.keys() - RECIPES.keys())
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        "# Models",
        "",
        f"Of the {len(_TEXT_GENERATION_MODELS)} decoder architectures in vLLM's registry, tiny "
        f"random checkpoints of {len(found)} were run through a real engine, by "
        "`python -m vllm_sink.models`: prompts in chunks beside streams that decode, past 4 times "
        "(sinks + window), and one stream again from the prefix cache. *Error* is the largest "
        "difference of a log-probability from transformers' own model of the checkpoint, in "
        f"float64, token by token with the method of the paper. {versions}.",
        "",
        f"## Right: {len(right)}",
        "",
        "| architecture | layers | error | cached |",
        "|---|---|---|---|",
        *(_row(name, found[name]) for name in right),
        "",
        f"## Refused: {len(refused)}",
        "",
        "| architecture | the sentence |",
        "|---|---|",
        *(f"| {name} | {found[name]['refused']} |" for name in refused),
        "",
        f"## Not run by vLLM's own CPU build, without sinks: {len(faults)}",
        "",
        "| architecture | why |",
        "|---|---|",
        *(f"| {name} | {found[name]['fault']} |" for name in faults),
        "",
        f"## Not shown to be right: {len(wrong)}",
        "",
        "| architecture | with sinks | vLLM without sinks |",
        "|---|---|---|",
        *(f"| {name} | {_end(found[name])} | {_end(found[name]['stock'])} |" for name in wrong),
        "",
        f"## Untried: {len(untried)}",
        "",
        "No tiny checkpoint is made of these: " + ", ".join(untried) + ".",
    ]
    return "\n".join(lines) + "\n"


def line(architecture: str, found: dict[str, Any]) -> str:
    """For who watches."""
    end = found.get("refused") or found.get("fault") or _end(found)
    stock = f"; without sinks: {_end(found['stock'])}" if "stock" in found else ""
    return f"{architecture}: {end}{stock}"


def _row(name: str, found: dict[str, Any]) -> str:
    layers = "; ".join(f"{number} {kind}" for kind, number in found["layers"].items())
    return f"| {name} | {layers} | {found['error']:.1e} | {found['cached']} |"


def _end(found: dict[str, Any]) -> str:
    return found.get("failed") or f"{found['error']:.1e}"

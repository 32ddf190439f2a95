"""The page of a GPU: what was checked on it, and what came of it."""

from launch.card import Card
from launch.steps import Outcome


def page(card: Card, command: str, given: dict[str, str], outcomes: list[Outcome]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in given.items())
    return "\n".join(
        [
            f"# {card.name}",
            "",
            f"Made by `{command}`, with {versions}.",
            "",
            "| step | outcome | seconds |",
            "|---|---|---|",
            *map(row, outcomes),
            *(line for outcome in outcomes if outcome.output for line in section(outcome)),
            "",
        ]
    )


def row(outcome: Outcome) -> str:
    state = f"{outcome.state}: {outcome.why}" if outcome.why else outcome.state
    return f"| {outcome.name} | {state} | {outcome.seconds or ''} |"


def section(outcome: Outcome) -> list[str]:
    return ["", f"## {outcome.name}", "", "```", outcome.output, "```"]

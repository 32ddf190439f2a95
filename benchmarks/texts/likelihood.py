"""Negative log-likelihoods of a text's tokens, in nats, and what is read off them.

A list `nll` starts with the second token of the text: the first has nothing before it.
"""

import math
from statistics import fmean, stdev

THOUSAND = 1000


def perplexity(nll: list[float]) -> float:
    return math.exp(fmean(nll))


def by_thousand(nll: list[float]) -> list[float]:
    """Perplexity of tokens 0-999, 1000-1999 and so on."""
    positioned = [math.nan, *nll]
    thousands = [positioned[i : i + THOUSAND] for i in range(0, len(positioned), THOUSAND)]
    return [
        perplexity(thousand[1:] if i == 0 else thousand) for i, thousand in enumerate(thousands)
    ]


def ratio(ours: list[float], others: list[float]) -> dict[str, float]:
    """Perplexity over perplexity on the same tokens, and its standard error."""
    differences = [a - b for a, b in zip(ours, others, strict=True)]
    value = math.exp(fmean(differences))
    error = value * stdev(differences) / math.sqrt(len(differences))
    return {"ratio": round(value, 4), "standard_error": round(error, 4)}


def far_over_fresh(far: list[float], fresh: list[float]) -> list[float]:
    """Perplexity of the same text late and early in a stream, by thousand of the fresh stream.

    Both end with the same token. Leaves out the fresh stream's first thousand, which begins without
    a context.
    """
    late = by_thousand(far[-len(fresh) :])
    return [a / b for a, b in zip(late, by_thousand(fresh), strict=True)][1:]

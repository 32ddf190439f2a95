"""What the StreamingLLM paper reports (arXiv 2309.17453), to stand beside what is measured here."""

PERPLEXITY = {
    # Figure 1 and table 1: Llama-2-13B, the first book of PG19's test set, 65,000 tokens.
    "dense": 5641.0,
    "window": 5158.0,
    "recompute": 5.43,
    "sink-4": 5.40,
}
SINKS = {0: 3359.95, 1: 11.88, 2: 10.51, 4: 9.59, 8: 9.54}
"""Table 2: perplexity by sink tokens, Llama-2-7B, 400,000 tokens, a cache of 4,096."""
LATENCY_MS = {"recompute": 2355.0, "sink": 106.0}
"""Figure 10: a token of Llama-2-13B on an A6000 with a cache of 4,096."""

"""What this project costs and what it keeps, measured on real vLLM: one command a question.

    python -m benchmarks.speed       decode and prefill against stock vLLM
    python -m benchmarks.position    step time and memory far down a stream
    python -m benchmarks.perplexity  quality over a book, past the trained context

Each prints a table and writes JSON to `benchmarks/results/`; `--quick` only shows that it runs.
"""

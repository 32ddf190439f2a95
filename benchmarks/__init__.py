"""What this project costs and what it keeps, measured on real vLLM: one command a question.

Quality
    python -m benchmarks.perplexity  over a long text, past the trained context
    python -m benchmarks.peers       token by token beside attention-sinks and llama.cpp
    python -m benchmarks.compaction  what follows a compaction, and what it costs
    python -m benchmarks.streameval  what is recalled, and from how far back
Speed
    python -m benchmarks.recompute   a token's latency against reading the window anew for each
    python -m benchmarks.speed       decode and prefill against stock vLLM
    python -m benchmarks.position    step time and memory far down a stream
    python -m benchmarks.attention   the GPU kernel beside memory bandwidth and vLLM's kernels
Many streams
    python -m benchmarks.capacity    streams that a KV pool holds
    python -m benchmarks.throughput  concurrent clients over HTTP, against every baseline
    python -m benchmarks.scale       a million sessions on many replicas, simulated (with Ray)

    python -m benchmarks.report      one page of all results

Each prints a table and writes JSON to `benchmarks/results/`; `--quick` only shows that it runs.
They use public interfaces alone: HTTP, Prometheus metrics, `vllm.LLM`; `attention` calls kernels,
`scale` the methods of a router.

Questions import from `texts` and `harness`, `texts` from `harness` alone; `guests` are run by path.
"""

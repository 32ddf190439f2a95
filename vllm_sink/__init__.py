"""StreamingLLM for vLLM: attention sinks and a rolling window in the paged KV cache."""

"""What the server adds to vLLM's own: defaults, of the machine and of requests."""

"""Which of vLLM's architectures work with sinks, shown on tiny random checkpoints."""

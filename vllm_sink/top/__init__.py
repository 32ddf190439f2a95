"""A live view of a server in a terminal, from its `/metrics` alone: vLLM is not needed for it."""

"""What arms are called where people read of them: on the page of results and in its pictures."""

ARMS = {
    "sink": "sinks",
    "window": "window alone",
    "dense": "stock vLLM",
    "full": "nothing evicted",
    "recompute": "re-computation",
    "llamacpp": "llama.cpp",
    "session": "session, new messages alone",
    "session-all": "session, all messages",
    "straight": "server without Ray",
    "one": "one replica",
    "two": "two replicas",
    "stay": "stays",
    "spread": "spread by load",
    "llama.cpp-one": "llama.cpp, one at a time",
    "llama.cpp-half": "llama.cpp, half at a time",
    "sink-1": "1 sink",
    "sink-2": "2 sinks",
    "sink-4": "4 sinks",
    "sink-8": "8 sinks",
    "sink-1-stream-positions": "1 sink, not re-indexed",
    "sink-2-stream-positions": "2 sinks, not re-indexed",
    "sink-4-stream-positions": "4 sinks, not re-indexed",
    "sink-8-stream-positions": "8 sinks, not re-indexed",
    "sink-4-fresh": "4 sinks, from the middle on",
}


def of(arm: str) -> str:
    """An arm that has no name here keeps its own."""
    return ARMS.get(arm, arm)

"""Which keys a query sees, where they sit in the cache, and which blocks hold them. Integers only.

Every function is one of positions alone: never of chunk sizes, batching, preemption or cache hits.
`t` is a token's place in its stream, 0-based, never reset by eviction; the terms are those of
section 3.2 of the StreamingLLM paper (arXiv 2309.17453).
"""

from dataclasses import dataclass


def cdiv(tokens: int, size: int) -> int:
    """Ceiling division."""
    return -(-tokens // size)


@dataclass(frozen=True)
class Geometry:
    """S sink tokens and a window of W tokens, the query's own included."""

    sinks: int
    window: int

    def window_start(self, t: int) -> int:
        """The oldest key in the window of query `t`."""
        return max(0, t + 1 - self.window)

    def visible(self, t: int) -> list[int]:
        """The keys query `t` attends to, oldest first."""
        start = self.window_start(t)
        return [*range(min(self.sinks, start)), *range(start, t + 1)]

    def evicted(self, t: int) -> int:
        """E(t): how many tokens between the sinks and the window are gone for query `t`."""
        return max(0, t + 1 - self.window - self.sinks)

    def cache_position(self, t: int, j: int) -> int:
        """The place of key `j` in the cache of query `t`: below S + W for every visible key."""
        return j if j < self.window_start(t) else j - self.evicted(t)

    def sink_blocks(self, block_size: int) -> int:
        """Leading blocks that hold a sink token: pinned for the life of a stream."""
        return cdiv(self.sinks, block_size)

    def dead_blocks(self, computed_tokens: int, block_size: int) -> range:
        """Blocks that no query from `computed_tokens` on can see."""
        return range(self.sink_blocks(block_size), self.window_start(computed_tokens) // block_size)

    def max_blocks(self, block_size: int, in_flight_tokens: int = 1) -> int:
        """The most blocks a stream holds while `in_flight_tokens` are computed at once.

        One token at a time, this is ceil(S/B) + ceil((W-1)/B) + 1.
        """
        live_tokens = self.window - 1 + in_flight_tokens
        return self.sink_blocks(block_size) + cdiv(live_tokens - 1, block_size) + 1

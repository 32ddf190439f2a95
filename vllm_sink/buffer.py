"""A stream's buffer: the tokens that are kept of it to read it again. Integers only.

A stream has no end, what is held for it has. When the buffer reaches the mark it is compacted to
the stream's first S tokens and its last W, and these are read anew, at positions counted from the
buffer's start: the "sliding window with re-computation" of the StreamingLLM paper (arXiv
2309.17453, section 1), once in thousands of tokens. Where that happens follows from the stream's
own tokens alone, never from memory, batching or timing. A prompt is read whole, however long.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """Of streams with S `sinks` and a window of W tokens; compacted at `mark` > S + W tokens."""

    sinks: int
    window: int
    mark: int

    @property
    def kept(self) -> int:
        """Tokens that a compaction leaves: S + W."""
        return self.sinks + self.window

    def is_full(self, tokens: int) -> bool:
        """Whether a buffer of so many tokens, one of them generated at least, is compacted."""
        return tokens >= self.mark

    def room(self, tokens: int) -> int:
        """Generated tokens that a buffer of so many takes before it is full; one at least."""
        return max(self.mark - tokens, 1)

    def compact(self, tokens: list[int]) -> list[int]:
        """What a full buffer becomes."""
        return tokens[: self.sinks] + tokens[-self.window :]

    def extended(self, tokens: list[int], generated: Sequence[int]) -> list[int]:
        """What a buffer becomes as its stream goes on with generated tokens; it may be changed."""
        while generated:
            room = self.room(len(tokens))
            tokens.extend(generated[:room])
            generated = generated[room:]
            if self.is_full(len(tokens)):
                tokens = self.compact(tokens)
        return tokens

    def first_compaction(self, prompt: int) -> int:
        """Tokens of a stream as it is compacted first; `prompt` is the length of its prompt."""
        return max(self.mark, prompt + 1)

    def compactions(self, prompt: int, tokens: int) -> int:
        """How often a stream of so many tokens was compacted."""
        first = self.first_compaction(prompt)
        return 0 if tokens < first else 1 + (tokens - first) // (self.mark - self.kept)

    def forgotten(self, prompt: int, tokens: int) -> int:
        """How many tokens of the stream, behind its sinks, the buffer does not hold any more."""
        compactions = self.compactions(prompt, tokens)
        if not compactions:
            return 0
        last = self.first_compaction(prompt) + (compactions - 1) * (self.mark - self.kept)
        return last - self.kept

    def stream_positions(self, prompt: int, tokens: int) -> list[int]:
        """The place in the stream of each token that the buffer holds."""
        forgotten = self.forgotten(prompt, tokens)
        return [*range(self.sinks), *range(self.sinks + forgotten, tokens)][:tokens]

    def longest(self, prompt: int, tokens: int) -> int:
        """The most tokens that the buffer holds on the way to a stream of so many."""
        return min(tokens, self.first_compaction(prompt))

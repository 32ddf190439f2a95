"""A streamed answer's front end, bounded: what was sent is forgotten.

vLLM keeps every token of an answer, its text and its log-probabilities until the answer ends, where
a streamed one needs what it has not sent alone (vllm/v1/engine/detokenizer.py, logprobs.py). There
is no seam for it, so `RequestState.make_request_output` is wrapped, which is called after each step
of each request. Front-end state that drops what a delta has sent would make this unnecessary.
"""

from collections.abc import Callable
from typing import Any, overload

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.detokenizer import (
    BaseIncrementalDetokenizer,
    IncrementalDetokenizer,
    SlowIncrementalDetokenizer,
)
from vllm.v1.engine.output_processor import RequestState

from vllm_sink.plugin.wrapping import wrap

AT_ONCE = 1024
"""How many tokens or characters are forgotten at a time, not to copy the rest at every step."""
DECODING_CONTEXT = 4
"""Tokens before it that complete a token's characters (`LogprobsProcessor`)."""


class RecentTokens:
    """A list whose oldest items are gone; its length and its indices are as if they were not."""

    def __init__(self, tokens: list[int]) -> None:
        self.forgotten = 0
        self.recent = tokens

    def forget_before(self, index: int) -> None:
        del self.recent[: index - self.forgotten]
        self.forgotten = index

    def append(self, token: int) -> None:
        self.recent.append(token)

    def extend(self, tokens: list[int]) -> None:
        self.recent.extend(tokens)

    def __len__(self) -> int:
        return self.forgotten + len(self.recent)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self.recent[self._shifted(index)]

    def __delitem__(self, index: int | slice) -> None:
        del self.recent[self._shifted(index)]

    def _shifted(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return slice(start - self.forgotten, stop - self.forgotten, step)
        return index if index < 0 else index - self.forgotten


def register() -> None:
    wrap(RequestState, "make_request_output", made)


def made(original: Callable[..., Any], state: RequestState, *args: Any, **kwargs: Any) -> Any:
    output = original(state, *args, **kwargs)
    if state.output_kind is RequestOutputKind.DELTA and state.detokenizer is not None:
        forget_sent(state)
    return output


def forget_sent(state: RequestState) -> None:
    unsent = _forget_tokens(state.detokenizer, state)
    if isinstance(state.detokenizer, BaseIncrementalDetokenizer):
        _forget_text(state.detokenizer)
    if isinstance(state.detokenizer, SlowIncrementalDetokenizer):
        _forget_pieces(state.detokenizer)
    logprobs = state.logprobs_processor.logprobs
    if logprobs is not None and len(logprobs) >= unsent + AT_ONCE:
        state.logprobs_processor.logprobs = logprobs[-unsent - DECODING_CONTEXT :]


def _forget_tokens(detokenizer: IncrementalDetokenizer, state: RequestState) -> int:
    """Returns how many tokens there are that were not sent."""
    if not isinstance(detokenizer.token_ids, RecentTokens):
        tokens = detokenizer.token_ids
        if isinstance(detokenizer, SlowIncrementalDetokenizer):
            # It has the prompt in front, from where on it counts.
            tokens = tokens[detokenizer.prompt_len :]
            detokenizer.prompt_len = 0
        detokenizer.token_ids = RecentTokens(tokens)
    tokens = detokenizer.token_ids
    sent = state.sent_tokens_offset if state.stream_interval > 1 else len(tokens)
    # The last token stays: the next one is decoded after it.
    if sent - 1 - tokens.forgotten >= AT_ONCE:
        tokens.forget_before(sent - 1)
    return len(tokens) - sent


def _forget_text(detokenizer: BaseIncrementalDetokenizer) -> None:
    """A stop string may have begun in what was sent."""
    behind = max(map(len, detokenizer.stop), default=0)
    gone = detokenizer._last_output_text_offset - behind
    if gone >= AT_ONCE:
        detokenizer.output_text = detokenizer.output_text[gone:]
        detokenizer._last_output_text_offset -= gone


def _forget_pieces(detokenizer: SlowIncrementalDetokenizer) -> None:
    gone = min(detokenizer.prefix_offset, detokenizer.read_offset)
    if gone >= AT_ONCE:
        detokenizer.tokens = detokenizer.tokens[gone:]
        detokenizer.prefix_offset -= gone
        detokenizer.read_offset -= gone

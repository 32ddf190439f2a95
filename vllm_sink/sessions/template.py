"""What new messages add to a stream, by a chat template that knows whole conversations alone.

The conversation so far is not kept, and need not be: a stand-in of it, a question and an answer,
is rendered with the new messages behind it, twice, with different answers. What both have in
common behind their answers is what the new messages add, the closing of the answer included.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], Awaitable[list[int]]]
"""A conversation's tokens, by a template; whether they end where an answer begins."""

QUESTION: Message = {"role": "user", "content": "?"}
ANSWERS = ("yes", "no")
"""They end in different tokens, whatever stands before them."""


async def added(
    render: Render, calls: Sequence[str], messages: Sequence[Message], end: int | None
) -> list[int]:
    """Tokens that follow a stream's answer, up to where the next one begins.

    `calls` are the functions that this answer calls, `end` is its last token, if it may be one that
    ends a turn: such an answer is closed already, others (at a limit, at a stop string) are not.
    """
    closing = await behind(render, calls, (), False)
    whole = await behind(render, calls, messages, True)
    if end in closing:
        return whole[closing.index(end) + 1 :]
    return whole


async def behind(
    render: Render, calls: Sequence[str], messages: Sequence[Message], answer_next: bool
) -> list[int]:
    """What a stand-in conversation that goes on with `messages` has behind its answer."""
    one, other = [
        await render([QUESTION, answered(said, calls, messages), *messages], answer_next)
        for said in ANSWERS
    ]
    return common_prefix(one[::-1], other[::-1])[::-1]


async def system_tokens(render: Render, system: Message) -> int:
    """How many first tokens of a stream hold its system prompt and the beginning of a message."""
    one, other = [
        await render([system, {"role": "user", "content": said}], True) for said in ANSWERS
    ]
    return len(common_prefix(one, other))


def answered(text: str, calls: Sequence[str], replies: Sequence[Message]) -> Message:
    """An answer that says `text` and calls what the tools among `replies` reply to."""
    if not calls:
        return {"role": "assistant", "content": text}
    ids = [reply.get("tool_call_id") for reply in replies if reply["role"] == "tool"]
    # Some templates leave out the content of an answer with calls.
    arguments = json.dumps({"said": text})
    made = [
        {
            "id": id or f"call{place:05}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for place, (name, id) in enumerate(zip_longest(calls, ids[: len(calls)]))
    ]
    return {"role": "assistant", "content": text, "tool_calls": made}


def common_prefix(one: list[int], other: list[int]) -> list[int]:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return one[:length]

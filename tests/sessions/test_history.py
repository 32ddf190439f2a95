import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_sink.sessions.errors import ConflictError, SessionError
from vllm_sink.sessions.history import KEPT, History

Message = dict[str, Any]

WORDS = st.text(min_size=1).filter(lambda text: text == text.strip())
CALLS = st.builds(
    lambda name, arguments: {
        "id": "call-1",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    },
    WORDS,
    st.dictionaries(WORDS, st.integers() | WORDS, max_size=3),
)
SAID = st.builds(lambda role, text: {"role": role, "content": text}, st.just("user"), WORDS)
RESULTS = st.builds(lambda text: {"role": "tool", "content": text, "tool_call_id": "1"}, WORDS)
ANSWERS = st.builds(
    lambda text, calls: {"role": "assistant", "content": text, "tool_calls": calls},
    st.none() | WORDS,
    st.lists(CALLS, max_size=2),
)
NEW = st.lists(SAID | RESULTS, min_size=1, max_size=3)
TURNS = st.lists(st.tuples(NEW, ANSWERS), min_size=1, max_size=12).map(
    lambda turns: [message for new, answer in turns for message in [*new, answer]]
)


def spoken(count: int) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": f"Line {place}"} for place in range(count)]


@given(TURNS, NEW)
def test_of_the_whole_history_and_new_messages_the_new_ones_are_new(
    turns: list[Message], new: list[Message]
) -> None:
    assert History().after(turns).new([*turns, *new]) == new


@given(TURNS, NEW)
def test_new_messages_alone_are_new(turns: list[Message], new: list[Message]) -> None:
    assert History().after(turns).new(new) == new


@given(TURNS, NEW)
def test_a_session_without_messages_takes_all(turns: list[Message], new: list[Message]) -> None:
    assert History().new([*turns, *new]) == [*turns, *new]


@given(TURNS, st.data())
def test_turn_by_turn_is_as_at_once(turns: list[Message], data: st.DataObject) -> None:
    split = data.draw(st.integers(0, len(turns)))
    assert History().after(turns[:split]).after(turns[split:]) == History().after(turns)


def changes(message: Message) -> list[Message]:
    """The message with each thing changed that counts."""
    changed = [
        message | {"role": "system"},
        message | {"content": (message["content"] or "") + "x"},
    ]
    for place, call in enumerate(message.get("tool_calls", [])):
        calls = list(message["tool_calls"])
        others = [
            {"name": call["function"]["name"] + "x"},
            {"arguments": json.dumps(json.loads(call["function"]["arguments"]) | {" ": 0})},
        ]
        for other in others:
            calls[place] = call | {"function": call["function"] | other}
            changed.append(message | {"tool_calls": list(calls)})
        changed.append(message | {"tool_calls": calls[:place] + calls[place + 1 :]})
    return changed


@given(TURNS, NEW, st.data())
def test_any_change_is_a_contradiction_and_its_place_is_told(
    turns: list[Message], new: list[Message], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(turns) - 1))
    changed = data.draw(st.sampled_from(changes(turns[place])))
    messages = [*turns[:place], changed, *turns[place + 1 :], *new]
    assume({message["role"] for message in messages} > {"user"})
    oldest = max(0, len(turns) - KEPT)
    if place > oldest or not oldest:
        told = rf"from messages\[{place}\] on$"
    else:
        told = f"in one of its first {oldest + 1} messages$"
    with pytest.raises(ConflictError, match=told):
        History().after(turns).new(messages)


@pytest.mark.parametrize("count", [2, 8, KEPT, KEPT + 1, KEPT + 8, 200])
def test_each_place_of_a_change_is_told(count: int) -> None:
    turns = spoken(count)
    history = History().after(turns)
    oldest = max(0, count - KEPT)
    for place in range(count):
        changed = [*turns[:place], turns[place] | {"content": "x"}, *turns[place + 1 :]]
        with pytest.raises(ConflictError) as raised:
            history.new([*changed, {"role": "user", "content": "More"}])
        if oldest and place <= oldest:
            told = f"in one of its first {oldest + 1} messages"
        else:
            told = f"from messages[{place}] on"
        assert str(raised.value) == f"the history differs from what the session has, {told}"


@pytest.mark.parametrize("count", [4, 100])
def test_a_history_that_is_too_short_is_told_so(count: int) -> None:
    turns = spoken(count)
    history = History().after(turns)
    for sent in range(2, count):
        told = f"^the history ends after {sent} messages, the session has {count}; send all of"
        with pytest.raises(ConflictError, match=told):
            history.new(turns[:sent])


def test_nothing_new() -> None:
    turns = spoken(4)
    with pytest.raises(SessionError, match=r"^the session has all of these messages: none is new$"):
        History().after(turns).new(turns)


ANSWER: Message = {
    "role": "assistant",
    "content": "I look it up.",
    "tool_calls": [
        {
            "id": "call-1",
            "type": "function",
            "function": {"name": "find", "arguments": '{"what": "a", "where": {"x": 1, "y": 2}}'},
        }
    ],
}


@pytest.mark.parametrize(
    "echo",
    [
        {"refusal": None, "annotations": None, "audio": None, "function_call": None},
        {"reasoning": "It asks for a.", "reasoning_content": "It asks for a."},
        {"content": " I look it up.\n"},
        {"content": [{"type": "text", "text": "I look it up."}]},
        {"content": ["I look it up."]},
        {"tool_calls": [ANSWER["tool_calls"][0] | {"id": "other"}]},
        {
            "tool_calls": [
                {"function": {"name": "find", "arguments": '{"where":{"y":2,"x":1},"what":"a"}'}}
            ]
        },
        {
            "tool_calls": [
                {
                    "function": {
                        "name": "find",
                        "arguments": {"where": {"y": 2, "x": 1}, "what": "a"},
                    }
                }
            ]
        },
    ],
)
def test_what_clients_change_when_they_send_an_answer_back(echo: Message) -> None:
    question = {"role": "user", "content": "Find a."}
    history = History().after([question, ANSWER])
    new = [{"role": "tool", "content": "b", "tool_call_id": "call-1"}]
    assert history.new([question, ANSWER | echo, *new]) == new


def test_an_answer_of_tool_calls_alone() -> None:
    question = {"role": "user", "content": "Find a."}
    calls = [{"function": {"name": "list", "arguments": ""}}]
    told = {"role": "assistant", "content": None, "tool_calls": calls}
    for echo in (
        told | {"content": ""},
        {"role": "assistant", "tool_calls": calls},
        told | {"tool_calls": [{"function": {"name": "list", "arguments": "{}"}}]},
    ):
        new = [{"role": "tool", "content": "b"}]
        assert History().after([question, told]).new([question, echo, *new]) == new


def test_arguments_that_are_no_json_count_as_they_are() -> None:
    def called(arguments: str) -> Message:
        return {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "find", "arguments": arguments}}],
        }

    history = History().after([called('{"a": ')])
    new = [{"role": "user", "content": "Go on."}]
    assert history.new([called('{"a": '), *new]) == new
    with pytest.raises(ConflictError):
        history.new([called('{"a":'), *new])


@pytest.mark.parametrize("history", [History(), History().after(spoken(4))])
def test_no_messages(history: History) -> None:
    with pytest.raises(SessionError, match=r"^messages: none is there"):
        history.new([])


@pytest.mark.parametrize(
    "call",
    [
        {"id": "1", "type": "custom", "custom": {"name": "f", "input": "x"}},
        {"function": {"name": "f", "arguments": "[" * 100_000}},
    ],
    ids=["no function", "too deep"],
)
def test_a_call_that_no_answer_has(call: Any) -> None:
    said = {"role": "assistant", "content": "Line 1", "tool_calls": [call]}
    with pytest.raises(ConflictError, match="differs"):
        History().after(spoken(2)).new([spoken(1)[0], said, {"role": "user", "content": "?"}])

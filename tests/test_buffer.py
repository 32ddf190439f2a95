import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sink.buffer import Buffer

BUFFERS = st.builds(
    lambda sinks, window, room: Buffer(sinks, window, sinks + window + room),
    st.integers(0, 9),
    st.integers(1, 20),
    st.integers(1, 40),
)


@given(BUFFERS, st.integers(1, 120), st.integers(0, 200))
def test_positions_are_those_of_a_buffer_that_is_filled_token_by_token(
    buffer: Buffer, prompt: int, generated: int
) -> None:
    held, compactions, longest = list(range(prompt)), 0, prompt
    for position in range(prompt, prompt + generated):
        held.append(position)
        longest = max(longest, len(held))
        if buffer.is_full(len(held)):
            held = buffer.compact(held)
            compactions += 1
    tokens = prompt + generated
    assert buffer.stream_positions(prompt, tokens) == held
    assert buffer.compactions(prompt, tokens) == compactions
    assert buffer.longest(prompt, tokens) == longest


@given(BUFFERS, st.integers(1, 120), st.integers(0, 200))
def test_a_buffer_holds_the_window_and_the_sinks(buffer: Buffer, prompt: int, more: int) -> None:
    tokens = prompt + more
    held = buffer.stream_positions(prompt, tokens)
    assert held[-buffer.window :] == list(range(max(0, tokens - buffer.window), tokens))
    assert held[: buffer.sinks] == list(range(min(buffer.sinks, tokens)))
    assert len(held) <= max(buffer.mark, prompt)


@pytest.mark.parametrize(
    ("prompt", "tokens", "held"),
    [
        (3, 9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 10, [0, 1, 7, 8, 9]),
        (3, 14, [0, 1, 7, 8, 9, 10, 11, 12, 13]),
        (3, 15, [0, 1, 12, 13, 14]),
        (12, 12, list(range(12))),
        (12, 13, [0, 1, 10, 11, 12]),
    ],
)
def test_two_sinks_a_window_of_three_and_a_mark_of_ten(
    prompt: int, tokens: int, held: list[int]
) -> None:
    assert Buffer(2, 3, 10).stream_positions(prompt, tokens) == held

from typing import Any

import pytest

from vllm_sink.settings import SettingsError, SinkSettings

FROM = "accepted from 2049 on, S + W and one more token"
WHERE = "accepted where tokens are evicted and positions re-indexed alone"


def test_defaults_are_the_papers() -> None:
    settings = SinkSettings.parse({})
    assert (settings.policy, settings.sink_tokens, settings.window_tokens) == ("sink", 4, 2044)
    assert settings.reindex
    assert settings.evicts


def test_window_policy_keeps_no_sinks() -> None:
    assert SinkSettings.parse({"policy": "window", "sink_tokens": 4}).sinks == 0


def test_full_policy_evicts_nothing() -> None:
    assert not SinkSettings.parse({"policy": "full"}).evicts


@pytest.mark.parametrize(
    ("raw", "max_model_len", "mark"),
    [
        ({}, 10**6, 32 * 2048),
        ({}, 9999, 9999),
        ({}, 2049, 2049),
        ({}, 2048, None),
        ({"compact_tokens": 2049}, 10**6, 2049),
        ({"policy": "window", "compact_tokens": 2045}, 10**6, 2045),
        ({"policy": "full"}, 10**6, None),
        ({"reindex": False}, 10**6, None),
    ],
    ids=str,
)
def test_the_mark_is_asked_for_or_what_there_is_room_for(
    raw: dict[str, Any], max_model_len: int, mark: int | None
) -> None:
    buffer = SinkSettings.parse(raw).buffer(max_model_len)
    assert (buffer and buffer.mark) == mark


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"sink_tokens": -1}, "sink.sink_tokens=-1: input should be greater than or equal to 0"),
        ({"window_tokens": 0}, "sink.window_tokens=0: input should be greater than or equal to 1"),
        ({"window_tokens": "12"}, "sink.window_tokens='12': input should be a valid integer"),
        ({"policy": "lru"}, "sink.policy='lru': input should be 'sink', 'window' or 'full'"),
        (
            {"sinks": 4},
            "sink.sinks=4: unknown; accepted keys are "
            "policy, sink_tokens, window_tokens, reindex, compact_tokens",
        ),
        ({"compact_tokens": 0}, "sink.compact_tokens=0: " + FROM),
        ({"compact_tokens": 2048}, "sink.compact_tokens=2048: " + FROM),
        ({"compact_tokens": "9999"}, "sink.compact_tokens='9999': input should be a valid integer"),
        ({"compact_tokens": 9999, "policy": "full"}, "sink.compact_tokens=9999: " + WHERE),
        ({"compact_tokens": 9999, "reindex": False}, "sink.compact_tokens=9999: " + WHERE),
        (
            {"compact_tokens": 1, "sink_tokens": -1},
            "sink.sink_tokens=-1: input should be greater than or equal to 0",
        ),
        (7, "sink=7: input should be a valid dictionary or instance of SinkSettings"),
    ],
    ids=str,
)
def test_what_is_wrong_fits_in_one_sentence(raw: Any, sentence: str) -> None:
    with pytest.raises(SettingsError, match=r"^.+$") as raised:
        SinkSettings.parse(raw)
    assert str(raised.value) == sentence

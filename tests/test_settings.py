from typing import Any

import pytest

from vllm_sink.settings import SettingsError, SinkSettings


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
    ("raw", "sentence"),
    [
        ({"sink_tokens": -1}, "sink.sink_tokens=-1: input should be greater than or equal to 0"),
        ({"window_tokens": 0}, "sink.window_tokens=0: input should be greater than or equal to 1"),
        ({"window_tokens": "12"}, "sink.window_tokens='12': input should be a valid integer"),
        ({"policy": "lru"}, "sink.policy='lru': input should be 'sink', 'window' or 'full'"),
        (
            {"sinks": 4},
            "sink.sinks=4: unknown; accepted keys are policy, sink_tokens, window_tokens, reindex",
        ),
        (7, "sink=7: input should be a valid dictionary or instance of SinkSettings"),
    ],
    ids=str,
)
def test_what_is_wrong_fits_in_one_sentence(raw: Any, sentence: str) -> None:
    with pytest.raises(SettingsError, match=r"^.+$") as raised:
        SinkSettings.parse(raw)
    assert str(raised.value) == sentence

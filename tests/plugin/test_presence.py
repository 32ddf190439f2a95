"""Engines whose processes do not all run the plugin. Processes without it are real ones."""

import os
import pickle
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_sink import plugin
from vllm_sink.plugin import presence
from vllm_sink.plugin.config import current_settings
from vllm_sink.plugin.presence import Vouched
from vllm_sink.settings import SettingsError

SINK = {"sink_tokens": 4, "window_tokens": 60}
LEFT_OUT = "VLLM_PLUGINS='': leaves out the plugin that evicts; accepted with sink settings is "


@pytest.fixture
def config() -> VllmConfig:
    plugin.register()
    return VllmConfig(additional_config={"sink": SINK, "other": 1})


def elsewhere(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_config_is_vouched_for_where_the_plugin_is(config: VllmConfig) -> None:
    assert config.additional_config == {"sink": SINK, "other": 1}
    assert isinstance(config.additional_config["sink"], Vouched)
    with set_current_vllm_config(config):
        assert current_settings() is not None


def test_copies_stay_vouched_for(config: VllmConfig) -> None:
    for copy in (deepcopy(config), pickle.loads(pickle.dumps(config))):
        entry = copy.additional_config["sink"]
        assert isinstance(entry, Vouched)
        assert entry == SINK


def test_a_worker_without_the_plugin_ends_as_the_config_arrives() -> None:
    arriving = pickle.dumps({"sink": Vouched(SINK)})
    code = f"import pickle; pickle.loads({arriving!r})"
    assert elsewhere(code).returncode == 0
    done = elsewhere(code, VLLM_PLUGINS="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"vllm_sink.settings.SettingsError: {LEFT_OUT}")


def test_a_config_from_a_process_without_the_plugin_is_not_served(config: VllmConfig) -> None:
    config.additional_config = {"sink": SINK}
    sentence = r"^additional_config\.sink={.*}: reached a worker from a process without the plugin;"
    with set_current_vllm_config(config), pytest.raises(SettingsError, match=sentence):
        current_settings()


@pytest.mark.parametrize("allowed", [None, ["sink"], ["sink", "other"]], ids=str)
def test_a_process_with_the_plugin(monkeypatch: pytest.MonkeyPatch, allowed: Any) -> None:
    if allowed:
        monkeypatch.setenv("VLLM_PLUGINS", ",".join(allowed))
    presence.require()


@pytest.mark.parametrize("allowed", ["", "other", "other,more"])
def test_a_plugin_left_out(monkeypatch: pytest.MonkeyPatch, allowed: str) -> None:
    monkeypatch.setattr(plugin, "loaded", False)
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    with pytest.raises(SettingsError, match=f"^VLLM_PLUGINS='{allowed}': leaves out the plugin"):
        presence.require()


NOT_INSTALLED = "import importlib.metadata as m; m.entry_points = lambda **_: []"
BROKEN = "import sys; sys.modules['vllm_sink.plugin.backend'] = None"


@pytest.mark.parametrize(
    ("cause", "sentence"),
    [
        (NOT_INSTALLED, "vllm.general_plugins='sink': this entry point is not installed or "),
        (BROKEN, "vllm.general_plugins: a plugin does not load: "),
    ],
    ids=["not installed", "broken"],
)
def test_a_plugin_that_is_not_there(cause: str, sentence: str) -> None:
    """The package is found all the same, since it lies in the folder."""
    done = elsewhere(f"{cause}; from vllm_sink.plugin.presence import require; require()")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"vllm_sink.settings.SettingsError: {sentence}")

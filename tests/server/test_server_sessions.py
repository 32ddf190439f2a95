"""How the server comes to have sessions."""

import os
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from vllm.plugins import load_endpoint_plugins

from vllm_sink.server.sessions import prepare
from vllm_sink.sessions.routes import NAME, SessionEndpoints
from vllm_sink.settings import SettingsError


def prepared(**changes: Any) -> Namespace:
    args = Namespace(session_store=None, session_ttl=None, headless=False, runner="auto")
    vars(args).update(changes)
    prepare(args)
    return args


def test_by_default_they_are_in_a_file_of_the_users(tmp_path: Path) -> None:
    args = prepared()
    path = Path(args.session_store.removeprefix("sqlite:"))
    assert path == tmp_path / "vllm_sink" / "sessions.sqlite"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not path.exists()


def test_vllm_loads_the_routes_and_all_that_it_loaded_without() -> None:
    prepared()
    names = os.environ["VLLM_PLUGINS"].split(",")
    assert NAME in names
    (loaded,) = load_endpoint_plugins(("generate",))
    assert isinstance(loaded, SessionEndpoints)
    for group in ("vllm.general_plugins", "vllm.stat_logger_plugins"):
        assert {plugin.name for plugin in entry_points(group=group)} <= {*names}


def test_a_list_of_plugins_stays_and_gets_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "sink")
    prepared()
    assert os.environ["VLLM_PLUGINS"] == f"sink,{NAME}"


@pytest.mark.parametrize("without", [{"session_store": "none"}, {"headless": True}])
def test_without_sessions_there_are_no_routes(without: dict[str, Any]) -> None:
    prepared(**without)
    assert "VLLM_PLUGINS" not in os.environ


def test_an_unknown_store_is_refused() -> None:
    with pytest.raises(SettingsError, match="--session-store is 'mysql:x'; accepted are sqlite:"):
        prepared(session_store="mysql:x")

"""Every process of an engine with sink settings runs the plugin, or none serves.

A worker without it would evict nothing and an engine core without it would evict the sinks, both in
silence. Whatever starts a process, the engine's config is pickled on the way, so the `sink` entry
asks for the plugin where it arrives; and an entry that never met the plugin is not served by.
"""

from typing import Any

from vllm import envs
from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_general_plugins

from vllm_sink import plugin
from vllm_sink.plugin import capacity
from vllm_sink.plugin.refusal import one_line, refuse
from vllm_sink.settings import SettingsError, SinkSettings

NAME = "sink"
"""Of the entry point, and of the entry in `additional_config`."""


class Vouched(dict[str, Any]):
    """The `sink` entry, seen by a process with the plugin; unpickled only by another one."""

    def __reduce__(self) -> Any:
        return _arrive, (dict(self),)


def require() -> None:
    """Raise `SettingsError`, one sentence, unless this process runs the plugin."""
    try:
        load_general_plugins()
    except Exception as error:
        refuse(f"{DEFAULT_PLUGINS_GROUP}: a plugin does not load: {one_line(error)}")
    if plugin.loaded:
        return
    allowed = envs.VLLM_PLUGINS
    if allowed is not None and NAME not in allowed:
        refuse(
            f"VLLM_PLUGINS={','.join(allowed)!r}: leaves out the plugin that evicts; accepted with "
            f"sink settings is a list with {NAME!r}, or no such variable"
        )
    refuse(
        f"{DEFAULT_PLUGINS_GROUP}={NAME!r}: this entry point is not installed or does not load, "
        f"and without it nothing is evicted; installing the package vllm_sink registers it"
    )


def require_vouched(entry: Any) -> None:
    """Raise `SettingsError` if a process without the plugin made this engine's config."""
    if not isinstance(entry, Vouched):
        raise SettingsError(
            f"additional_config.{NAME}={entry!r}: reached a worker from a process without the "
            "plugin; accepted where all processes of an engine have it"
        )


def _arrive(entry: dict[str, Any]) -> Vouched:
    require()
    capacity.log_for(SinkSettings.parse(entry))
    return Vouched(entry)

"""Seam: `VllmConfig.__post_init__` (vllm/config/vllm.py), where an engine's settings are whole.

vLLM has no hook for a general plugin to see a finished config, and a model without a layer of ours
(state-space, MLA) never meets our other seams: so that method is wrapped. A config validation hook
for general plugins in vLLM would make this unnecessary.
"""

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig

from vllm_sink.plugin import capacity, outputs, requests
from vllm_sink.plugin.check import check
from vllm_sink.plugin.config import SCHEDULERS, WORKERS, settings_of
from vllm_sink.plugin.presence import NAME, Vouched
from vllm_sink.plugin.wrapping import wrap


def register() -> None:
    wrap(VllmConfig, "__post_init__", completed)


def completed(original: Callable[..., None], vllm_config: VllmConfig, *args: Any) -> None:
    original(vllm_config, *args)
    complete(vllm_config)


def complete(vllm_config: VllmConfig) -> None:
    """Check the config and fit it out for sinks. Raises `SettingsError`, one sentence."""
    settings = settings_of(vllm_config)
    capacity.log_for(settings)
    if settings is None:
        return
    check(vllm_config, settings)
    entry = vllm_config.additional_config[NAME]
    vllm_config.additional_config = vllm_config.additional_config | {NAME: Vouched(entry)}
    if settings.evicts:
        outputs.register()
        requests.register()
        asynchronous = vllm_config.scheduler_config.async_scheduling
        vllm_config.scheduler_config.scheduler_cls = SCHEDULERS[asynchronous]
    parallel = vllm_config.parallel_config
    parallel.worker_cls = WORKERS.get(parallel.worker_cls, parallel.worker_cls)

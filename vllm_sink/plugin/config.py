"""Settings as vLLM carries them: `VllmConfig.additional_config["sink"]` (vllm/config/vllm.py)."""

from vllm.config import VllmConfig, get_current_vllm_config_or_none

from vllm_sink.buffer import Buffer
from vllm_sink.plugin.presence import NAME, require_vouched
from vllm_sink.settings import SinkSettings

SCHEDULERS = {
    False: "vllm_sink.plugin.scheduler.SinkScheduler",
    True: "vllm_sink.plugin.scheduler.AsyncSinkScheduler",
}
"""Of engines that evict, by whether scheduling is asynchronous."""
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_sink.plugin.cpu_worker.CPUSinkWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_sink.plugin.worker.SinkWorker",
}
"""In the place of vLLM's own."""


def settings_of(vllm_config: VllmConfig) -> SinkSettings | None:
    """The sink settings of an engine, or None where none are configured."""
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or NAME not in additional:
        return None
    return SinkSettings.parse(additional[NAME])


def buffer_of(vllm_config: VllmConfig) -> Buffer | None:
    """How an engine with sinks compacts its streams; None where it does not."""
    settings = settings_of(vllm_config)
    assert settings is not None
    return settings.buffer(vllm_config.model_config.max_model_len)


def current_settings() -> SinkSettings | None:
    """`settings_of` the engine whose model is being built, or None outside of one."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        return None
    settings = settings_of(vllm_config)
    if settings is not None:
        require_vouched(vllm_config.additional_config[NAME])
    return settings

"""Seam: `parallel_config.worker_cls`: what a worker does once its model is loaded.

vLLM has no hook for that; its workers are classes to be named in the config.
"""

from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.layers import LoRAMapping
from vllm.v1.worker.gpu_worker import Worker

from vllm_sink.plugin.config import settings_of
from vllm_sink.plugin.probe import TOKENS, probe
from vllm_sink.plugin.scaling import scale_by_cache_position


class SinkWorker(Worker):
    """A worker, on whatever device, whose model is probed before it serves."""

    vllm_config: VllmConfig

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        model, settings = self.get_model(), settings_of(self.vllm_config)
        assert settings is not None
        places = settings.evicts and settings.reindex
        scales = scale_by_cache_position(model, settings) if places else {}
        if self.vllm_config.lora_config:
            no_adapter = LoRAMapping((0,) * TOKENS, (0,), is_prefill=True)
            self.model_runner.lora_manager.set_active_adapters(set(), no_adapter)
        with set_current_vllm_config(self.vllm_config):
            probe(model, self.vllm_config, self.device, scales)

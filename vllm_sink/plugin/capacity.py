"""One capacity in the log: how many streams fit, as `SinkManager` sums it up.

vLLM's own (`update_kv_cache_capacity`, vllm/v1/core/kv_cache_utils.py) counts streams of
`max_model_len` tokens that each have a whole batch of a prompt in flight, and calls their product
the size of the KV cache.
"""

import logging

from vllm_sink.settings import SinkSettings

vllm_log = logging.getLogger("vllm.v1.core.kv_cache_utils")


def log_for(settings: SinkSettings | None) -> None:
    """Leave vLLM's line out of this process's log while its engine has a window."""
    if settings is not None and settings.evicts:
        vllm_log.addFilter(_is_not_capacity)
    else:
        vllm_log.removeFilter(_is_not_capacity)


def _is_not_capacity(record: logging.LogRecord) -> bool:
    return "KV cache size" not in str(record.msg)

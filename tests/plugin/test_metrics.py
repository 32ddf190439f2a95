"""The stat logger alone, on real engine configs; `tests/server/test_metrics.py` has a server's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import (
    LoggingStatLogger,
    StatLoggerManager,
    load_stat_logger_plugin_factories,
)
from vllm.v1.metrics.stats import SchedulerStats

from vllm_sink.plugin.metrics import NAMES, SinkStatLogger, unregister
from vllm_sink.plugin.statistics import (
    COMPACTIONS,
    EVICTED,
    HELD,
    POSITIONS,
    PREFIX,
    READ_ANEW,
    STATES,
)

MODEL = "tiny"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 128,
    "torch_dtype": "float32",
}
SINKS = {"sink": {"sink_tokens": 4, "window_tokens": 60}}
STOCK = {"an-adapter": 3}
OURS = {
    **dict(zip(STATES, (4, 3, 2, 1), strict=True)),
    **{str(bound): 5 if bound >= 1000 else 0 for bound in POSITIONS},
    "+Inf": 7,
    HELD: 20,
    EVICTED: 6,
    COMPACTIONS: 2,
    READ_ANEW: 128,
}

Configure = Callable[[dict[str, Any]], VllmConfig]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """An engine's config of some `additional_config`."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def make(additional_config: dict[str, Any]) -> VllmConfig:
        return EngineArgs(
            str(tmp_path),
            served_model_name=MODEL,
            skip_tokenizer_init=True,
            additional_config=additional_config,
        ).create_engine_config()

    return make


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """That has no metrics of ours."""
    unregister()
    yield
    unregister()


def step(**ours: int) -> SchedulerStats:
    """What a scheduler tells after a step, of ours beside vLLM's own."""
    told = {PREFIX + name: count for name, count in (OURS | ours).items()}
    return SchedulerStats(running_lora_adapters=STOCK | told)


def value(name: str, engine: int = 0, **labels: str) -> float | None:
    labels = {"model_name": MODEL, "engine": str(engine)} | labels
    return REGISTRY.get_sample_value(NAMES + name, labels)


def registered() -> list[str]:
    return [metric.name for metric in REGISTRY.collect() if metric.name.startswith(NAMES)]


def test_it_takes_its_own_out_of_the_stats_and_leaves_vllms(configure: Configure) -> None:
    stats = step()
    SinkStatLogger(configure(SINKS), [0]).record(stats, None)
    assert stats.running_lora_adapters == STOCK


def test_what_is_told_is_shown(configure: Configure) -> None:
    logger = SinkStatLogger(configure(SINKS), [0, 1])
    logger.record(step(), None, engine_idx=1)
    assert [value("streams", 1, state=state) for state in STATES] == [4, 3, 2, 1]
    assert value("stream_position_bucket", 1, le="300") == 0
    assert value("stream_position_bucket", 1, le="1000") == 5
    assert value("stream_position_bucket", 1, le="+Inf") == 7
    assert value("kv_blocks_held", 1) == 20
    assert value("kv_blocks_evicted_total", 1) == 6
    assert value("compactions_total", 1) == 2
    assert value("compaction_tokens_total", 1) == 128
    assert value("kv_blocks_held", 0) is None


def test_gauges_follow_and_counters_add_up(configure: Configure) -> None:
    logger = SinkStatLogger(configure(SINKS), [0])
    logger.record(step(), None)
    logger.record(step(held=0, compactions=1, read_anew=64), None)
    assert value("kv_blocks_held") == 0
    assert value("compactions_total") == 3
    assert value("compaction_tokens_total") == 192


@pytest.mark.parametrize("stats", [None, SchedulerStats()], ids=["none", "vllms"])
def test_steps_that_tell_nothing_change_nothing(
    configure: Configure, stats: SchedulerStats | None
) -> None:
    """A front end has iteration statistics alone, or an engine without streams."""
    logger = SinkStatLogger(configure(SINKS), [0])
    logger.record(step(), None)
    logger.record(stats, None)
    assert value("kv_blocks_held") == 20
    assert value("compactions_total") == 2


def test_a_second_engine_of_a_process_counts_anew(configure: Configure) -> None:
    """Without `Duplicated timeseries in CollectorRegistry`."""
    SinkStatLogger(configure(SINKS), [0]).record(step(), None)
    SinkStatLogger(configure(SINKS), [0]).record(step(), None)
    assert value("compactions_total") == 2


@pytest.mark.parametrize("additional_config", [{}, {"sink": {"policy": "full"}}], ids=str)
def test_an_engine_that_evicts_nothing_has_no_metrics_of_ours(
    configure: Configure, additional_config: dict[str, Any]
) -> None:
    stats = SchedulerStats(running_lora_adapters=dict(STOCK))
    SinkStatLogger(configure(additional_config), [0]).record(stats, None)
    assert registered() == []
    assert stats.running_lora_adapters == STOCK


def test_vllms_own_loggers_come_after_it(configure: Configure) -> None:
    """Seam: they see what it has left, and their lines and metrics are as without it."""
    manager = StatLoggerManager(
        configure(SINKS), custom_stat_loggers=load_stat_logger_plugin_factories()
    )
    assert isinstance(manager.stat_loggers[0], SinkStatLogger)
    manager.record(step(), None)
    (stock,) = (
        adapter.per_engine_stat_loggers[0]
        for adapter in manager.stat_loggers
        if hasattr(adapter, "per_engine_stat_loggers")
    )
    assert isinstance(stock, LoggingStatLogger)
    assert stock.last_scheduler_stats.running_lora_adapters == STOCK

import logging

import pytest

from vllm_sink.plugin import capacity
from vllm_sink.settings import SinkSettings

LINES = ["GPU KV cache size: 613,566,756 tokens, Maximum concurrency for ...: 146x", "Another line"]


@pytest.mark.parametrize(
    ("settings", "shown"),
    [(SinkSettings(), 1), (SinkSettings(policy="full"), 2), (None, 2)],
    ids=["sinks", "full", "stock"],
)
def test_vllms_line_is_left_out_with_a_window(
    settings: SinkSettings | None, shown: int, caplog: pytest.LogCaptureFixture
) -> None:
    capacity.log_for(SinkSettings())
    capacity.log_for(settings)
    with caplog.at_level(logging.INFO):
        for line in LINES:
            capacity.vllm_log.info(line)
    capacity.log_for(None)
    assert [record.message for record in caplog.records] == LINES[-shown:]

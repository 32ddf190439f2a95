import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from vllm_sink.plugin.refusal import LOGS, VARIABLE, passed_on, refuse
from vllm_sink.settings import SettingsError

REFUSING = "from vllm_sink.plugin.refusal import refuse; refuse('w=1: accepted is 2')"
FAILING = f"""
import logging
from vllm_sink import plugin
plugin.register()
for name, text in zip({LOGS}, ("first\\n words", "second")):
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger(name).exception("failed to start")
"""
FAILING_IN_RAY = f"""
import logging
from ray.exceptions import RayTaskError
from vllm_sink import plugin
from vllm_sink.settings import SettingsError
plugin.register()
try:
    cause = SettingsError("w=1: accepted is 2")
    raise RayTaskError("init", "Traceback", cause).as_instanceof_cause()
except SettingsError:
    logging.getLogger({LOGS[0]!r}).exception("failed to start")
"""


@pytest.fixture
def started() -> Callable[[str], None]:
    """A server whose process runs some code, and that fails after it."""

    @passed_on()
    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        raise RuntimeError("a process failed")

    return start


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (REFUSING, r"^w=1: accepted is 2$"),
        (FAILING, r"^first words$"),
        (FAILING_IN_RAY, r"^w=1: accepted is 2$"),
    ],
    ids=["refused", "failed", "failed in Ray"],
)
def test_the_first_word_of_a_process_comes_before_what_it_caused(
    started: Callable[[str], None], code: str, sentence: str
) -> None:
    with pytest.raises(SettingsError, match=sentence):
        started(code)
    assert VARIABLE not in os.environ


def test_other_errors_stay(started: Callable[[str], None]) -> None:
    with pytest.raises(RuntimeError, match=r"^a process failed$"):
        started("pass")


def test_without_a_server_it_is_raised_alone() -> None:
    with pytest.raises(SettingsError, match=r"^w=1: accepted is 2$"):
        refuse("w=1: accepted is 2")

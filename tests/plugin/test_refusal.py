import os
import subprocess
import sys

import pytest

from vllm_sink.plugin.refusal import VARIABLE, passed_on, refuse
from vllm_sink.settings import SettingsError

CHILD = "from vllm_sink.plugin.refusal import refuse; refuse('w=1: accepted is 2')"


def test_a_refusal_of_a_process_comes_before_what_it_caused() -> None:
    with pytest.raises(SettingsError, match=r"^w=1: accepted is 2$"), passed_on():
        subprocess.run([sys.executable, "-c", CHILD], stderr=subprocess.DEVNULL, check=True)
    assert VARIABLE not in os.environ


def test_other_errors_stay() -> None:
    with pytest.raises(RuntimeError, match=r"^a process failed$"), passed_on():
        raise RuntimeError("a process failed")


def test_without_a_server_it_is_raised_alone() -> None:
    with pytest.raises(SettingsError, match=r"^w=1: accepted is 2$"):
        refuse("w=1: accepted is 2")

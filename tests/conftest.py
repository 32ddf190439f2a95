"""What every test relies on, whatever it tests."""

import os
import secrets
import sys
from importlib.util import find_spec
from typing import Any

import hypothesis
import pytest

# No test may reach for a model hub. huggingface_hub reads this once, when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# No Ray of a test's lets others in, or leaves a token in the user's folder. Read at import, too.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Tiny tensors: threads that spin for one another only take the cores from other processes.
os.environ["OMP_NUM_THREADS"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and not find_spec("triton"):
    # Apart from .venv, where vLLM's CPU build would complain of it in every log.
    from benchmarks.harness import venvs

    sys.path += venvs.packages("triton")

# No test may fail because the machine is busy.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


if not find_spec("pytest_timeout"):

    def pytest_addoption(parser: pytest.Parser) -> None:
        """Of pyproject.toml's settings, the one that pytest alone would refuse."""
        parser.addini("timeout", "of pytest-timeout, which is not installed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # Where tests run on torch, triton, pytest and hypothesis alone, there is no pytest-xdist.
    from tests.scheduling import Scheduling

    return Scheduling(config, log)


@pytest.fixture(autouse=INTERPRETED)
def dots_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's interpreter keeps bfloat16 as uint16, and multiplies these as they are."""
    import numpy
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(x: Any) -> Any:
        if x.dtype.scalar != bfloat16:
            return x
        return TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), float32)

    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)

"""What every test relies on, whatever it tests."""

import os
from pathlib import PurePath

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# No test may reach for a model hub. huggingface_hub reads this once, when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors: threads that spin for one another only take the cores from other processes.
os.environ["OMP_NUM_THREADS"] = "1"

# No test may fail because the machine is busy.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


class Scheduling(LoadFileScheduling):
    """Files stay whole, and all that load models in vLLM stay in one process, in order.

    Once vLLM has loaded a GPT-NeoX, Transformers cannot make one in that process any more. Marks of
    `xdist_group` would say the same, but have no effect with pytest 9.2 and pytest-xdist 3.8.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "engines" if PurePath(file).parent.name in ("engine", "plugin") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)

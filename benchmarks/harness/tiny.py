"""A tiny random Llama and a text for it: where the model's size would only cost time."""

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_sink import embedded

SEED = 0
VOCABULARY = 128
MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}


@contextmanager
def llama(speaks: bool = False, **config: int) -> Iterator[str]:
    """The folder of its checkpoint; one that `speaks` has the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "tiny-llama")
        if speaks:
            # Of its tokens, those that this model has.
            AutoTokenizer.from_pretrained(embedded.path()).save_pretrained(folder)
        LlamaForCausalLM(LlamaConfig(**(MODEL | config))).save_pretrained(folder)
        yield str(folder)


def tokens(count: int) -> list[int]:
    return random.Random(SEED).choices(range(VOCABULARY), k=count)

"""Reads tokens with llama.cpp's context shift, in a virtual environment of its own, one at a time.

From stdin it takes one JSON object: `model` (a GGUF file), `tokens`, `sink_tokens`, `cache_tokens`
(held at most, the current one included) and `discard` (dropped at a shift, oldest first; the sinks
stay). To stdout it prints the negative log-likelihood of each token but the first, in nats, a line
each.
"""

import json
import math
import signal
import sys
from itertools import pairwise

from cyllama.llama import llama_cpp

CONTEXT_STEP = 256
"""llama.cpp rounds its context up to this."""


class Model(llama_cpp.LlamaModel):
    @property
    def n_vocab(self) -> int:
        """`LlamaContext.get_logits` asks the model for it, which lacks it in cyllama 0.2.18."""
        return self.get_vocab().n_vocab


def main() -> None:
    # Without a word where whoever reads is gone.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    request = json.load(sys.stdin)
    sinks, cache, discard = (request[key] for key in ("sink_tokens", "cache_tokens", "discard"))
    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()
    model = Model(request["model"])
    parameters = llama_cpp.LlamaContextParams()
    parameters.n_ctx = math.ceil(cache / CONTEXT_STEP) * CONTEXT_STEP
    parameters.n_threads = 1
    context = llama_cpp.LlamaContext(model, parameters)
    batch = llama_cpp.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
    held = 0
    for token, following in pairwise(request["tokens"]):
        if held == cache:
            context.memory_seq_rm(0, sinks, sinks + discard)
            context.memory_seq_add(0, sinks + discard, held, -discard)
            held -= discard
        batch.reset()
        batch.add(token, held, [0], True)
        context.decode(batch)
        held += 1
        print(negative_log_likelihood(context.get_logits(), following), flush=True)


def negative_log_likelihood(logits: list[float], token: int) -> float:
    largest = max(logits)
    return math.log(math.fsum(math.exp(x - largest) for x in logits)) + largest - logits[token]


if __name__ == "__main__":
    main()

"""Reads tokens with attention-sinks, in a virtual environment of its own, one token at a time.

From stdin it takes one JSON object: `model` (a Llama checkpoint's folder), `tokens`, `sink_tokens`
and `recent_tokens` (kept beside the sinks after a forward pass). To stdout it prints the negative
log-likelihood of each token but the first, in nats, a line each.
"""

import json
import logging
import signal
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from attention_sinks import AutoModelForCausalLM


def main() -> None:
    # Without a word where whoever reads is gone.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    logging.disable(logging.WARNING)
    request = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        as_transformers_4(Path(request["model"]), Path(folder))
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            attention_sink_size=request["sink_tokens"],
            attention_sink_window_size=request["recent_tokens"],
        ).eval()
    cache = None
    with torch.inference_mode():
        for token, following in pairwise(request["tokens"]):
            output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            print(-output.logits[0, -1].log_softmax(-1)[following].item(), flush=True)


def as_transformers_4(checkpoint: Path, folder: Path) -> None:
    """A checkpoint saved by transformers 5, in the words of transformers 4."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for weights in checkpoint.glob("*.safetensors"):
        (folder / weights.name).symlink_to(weights)


if __name__ == "__main__":
    main()

"""llama.cpp's server with context shift, in a virtual environment of its own.

A stream that fills its context keeps its first `--keep` tokens and drops half of the others.
"""

import signal
from argparse import ArgumentParser

import xllamacpp

parser = ArgumentParser()
parser.add_argument("--model")
for name in ("port", "streams", "stream-tokens", "keep"):
    parser.add_argument(f"--{name}", type=int)
options = parser.parse_args()

params = xllamacpp.CommonParams()
params.model.path = options.model
params.port = options.port
params.n_parallel = options.streams
params.n_ctx = options.streams * options.stream_tokens
params.n_keep = options.keep
params.ctx_shift = True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# No stream comes back, so none is kept beside the slots.
params.cache_ram_mib = 0
server = xllamacpp.Server(params)
signal.pause()

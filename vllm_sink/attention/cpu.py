"""The CPU kernel (sink_attention.cpp): compiled once for a kind of CPU, then loaded."""

import logging
import subprocess
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from vllm_sink.attention.interface import Attention, Batch, KVCache, Scoring, SinkTurn
from vllm_sink.attention.reference import ReferenceAttention
from vllm_sink.cache import folder
from vllm_sink.geometry import Geometry

logger = logging.getLogger(__name__)

COMPILER = "c++"
SOURCE = Path(__file__).with_name("sink_attention.cpp")


class CPUAttention:
    """An `Attention` of queries in float32, bfloat16 or float16, accumulated in float32."""

    def as_cache(self, storage: torch.Tensor) -> KVCache:
        """Keys lie transposed in a block, [head_size, block_size], ahead of the values."""
        blocks, kv_heads, block_size, width = storage.shape
        keys, values = storage.view(blocks, kv_heads, -1).chunk(2, dim=-1)
        return KVCache(
            keys.unflatten(-1, (width // 2, block_size)).transpose(-1, -2),
            values.unflatten(-1, (block_size, width // 2)),
        )

    def write(
        self, key: torch.Tensor, value: torch.Tensor, cache: KVCache, slots: torch.Tensor
    ) -> None:
        torch.ops.vllm_sink.write(key, value, _storage(cache), cache.keys.shape[2], slots)

    def attend(
        self,
        query: torch.Tensor,
        cache: KVCache,
        batch: Batch,
        geometry: Geometry,
        scoring: Scoring,
        turn: SinkTurn | None,
        out: torch.Tensor,
    ) -> None:
        torch.ops.vllm_sink.attend(
            query,
            _storage(cache),
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table,
            cache.keys.shape[2],
            geometry.sinks,
            geometry.window,
            scoring.scale,
            scoring.soft_cap,
            scoring.alibi_slopes,
            scoring.sink_logits,
            scoring.reindex,
            turn.rows if turn else None,
            turn.is_neox_style if turn else True,
            out,
        )


def _storage(cache: KVCache) -> torch.Tensor:
    """Where the allocation of a cache begins: keys lie first in each block."""
    return cache.keys


@cache
def cpu_attention() -> Attention:
    """The kernel, or the reference where it cannot be built."""
    try:
        load()
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("Sink attention runs in plain PyTorch, slower: no kernel (%s).", error)
        return ReferenceAttention()
    return CPUAttention()


def load() -> None:
    """Load the kernel, compiled at the first call for its source, flags, torch version and CPU.

    Raises OSError where there is no compiler, subprocess.CalledProcessError where it fails: then
    it has said why on stderr.
    """
    parts = [SOURCE.read_text(), torch.__version__, _native_target(), *_flags()]
    key = sha256("\0".join(parts).encode())
    library = folder() / f"sink_attention-{key.hexdigest()[:16]}.so"
    if not library.exists():
        # Renamed once whole: a build that is cut short leaves no lock and no half a library.
        with TemporaryDirectory(dir=library.parent) as unfinished:
            _compile(Path(unfinished, library.name)).rename(library)
    torch.ops.load_library(str(library))


def _compile(library: Path) -> Path:
    built = library.with_suffix(".o")
    subprocess.run([COMPILER, *_flags(), "-c", SOURCE, "-o", built], check=True)
    # Linked without OpenMP: torch has loaded its own, and a second would spin against it.
    paths = [f"-L{path}" for path in library_paths()]
    subprocess.run(
        [COMPILER, "-shared", built, "-o", library, *paths, "-ltorch_cpu", "-lc10"], check=True
    )
    return library


def _native_target() -> str:
    """What `-march=native` stands for here, as the compiler's macros: a cache may be shared."""
    macros = [COMPILER, "-march=native", "-dM", "-E", "-x", "c", "/dev/null"]
    return subprocess.run(macros, check=True, capture_output=True, text=True).stdout


def _flags() -> list[str]:
    """What ATen needs to see to use this CPU's vector instructions and torch's threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-fopenmp",
        "-fno-math-errno",
        "-march=native",
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}",
        *(f"-isystem{path}" for path in include_paths()),
    ]


if __name__ == "__main__":
    cpu_attention()

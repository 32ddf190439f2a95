"""`python -m tests.attention.compile_triton 90`: compile, for sm_90, what steps launch."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from tests.attention.cases import CASES, H100_PROCESSORS, inputs, over, paged, paged_in_fp8

LAUNCHED = (
    ("decode", torch.bfloat16),
    ("decode, alibi", torch.float16),
    ("mixed", torch.bfloat16),
    ("soft cap", torch.float32),
    ("partial interleaved", torch.bfloat16),
    ("head of 128", torch.bfloat16),
    ("head of 256", torch.float16),
    ("head of 256", torch.float32),
)
"""Cases, and what they are computed in."""

FP8_SINCE = 89


def launched(architecture: int) -> list[tuple[str, torch.dtype, bool]]:
    """With whether the cache is in FP8."""
    plain = [(*step, False) for step in LAUNCHED]
    return [*plain, *((*step, True) for step in LAUNCHED if architecture >= FP8_SINCE)]


SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Of a block at most (CUDA C++ Programming Guide, compute capabilities)."""

if __name__ == "__main__":
    if not find_spec("triton"):
        from benchmarks.harness import venvs

        sys.path += venvs.packages("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_sink.attention import triton as ours

    TYPES = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.float8_e4m3fn: "*fp8e4nv",
        torch.int32: "*i32",
        torch.int64: "*i64",
        float: "fp32",
        int: "i32",
    }

    class Compiler:
        """In place of a kernel: its launches are compiled instead."""

        def __init__(self, kernel: Any, architecture: int) -> None:
            self.kernel = kernel
            self.target = GPUTarget("cuda", architecture, 32)

        def __getitem__(self, grid: tuple[int, ...]) -> "Compiler":
            return self

        def __call__(self, *args: Any, **named: Any) -> None:
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | named
            constants = {
                (i,): given[parameter.name]
                for i, parameter in enumerate(self.kernel.params)
                if parameter.is_constexpr or given[parameter.name] is None
            }
            signature = {
                name: "constexpr" if (i,) in constants else self.type_of(given[name])
                for i, name in enumerate(self.kernel.arg_names)
            }
            # As launches are specialised: by alignment.
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(self.kernel.arg_names)
                if signature[name].startswith("*")
                or (signature[name] == "i32" and given[name] % 16 == 0)
            }
            source = ASTSource(self.kernel, signature, constants, aligned)
            built = triton.compile(source, target=self.target)
            assert built.metadata.shared <= SHARED_BYTES[self.target.arch]
            print(f"{self.kernel.__name__}: {built.metadata.shared} bytes of shared memory")

        @staticmethod
        def type_of(value: Any) -> str:
            return TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]

    for kernel in ("_attend", "_merge", "_write"):
        setattr(ours, kernel, Compiler(getattr(ours, kernel), int(sys.argv[1])))
    for name, dtype, in_fp8 in launched(int(sys.argv[1])):
        case = CASES[name]
        given = inputs(replace(case, requests=case.requests[:2]), dtype, seed=0)
        attention = ours.TritonAttention(processors=H100_PROCESSORS)
        cache = (paged_in_fp8 if in_fp8 else paged)(attention, case, given)
        over(cache, attention, case, given)

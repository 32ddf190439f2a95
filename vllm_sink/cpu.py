"""What this machine's CPU is good at."""


def fast_dtype() -> str:
    """The dtype to compute in: "float32" on x86 CPUs with AVX2 alone, else "bfloat16".

    Those have no instructions for bfloat16, and its matrix products are slow there.
    """
    import torch

    return "float32" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "bfloat16"

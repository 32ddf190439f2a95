"""The seams: everything here speaks to vLLM, one seam a file."""


def register() -> None:
    """Entry point of group `vllm.general_plugins`; runs in every process, before any config."""
    from vllm_sink.plugin import backend, check, manager, rotary

    for seam in (check, manager, backend, rotary):
        seam.register()

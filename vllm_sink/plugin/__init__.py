"""The seams: everything here speaks to vLLM, one seam a file."""

loaded = False
"""Whether this process runs the plugin."""


def register() -> None:
    """Entry point of group `vllm.general_plugins`; runs in every process, before any config."""
    global loaded
    from vllm_sink.plugin import (
        backend,
        engine_config,
        manager,
        refusal,
        rotary,
        transformers_rotary,
    )

    for seam in (refusal, engine_config, manager, backend, rotary, transformers_rotary):
        seam.register()
    loaded = True

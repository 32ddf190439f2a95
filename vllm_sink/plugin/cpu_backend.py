"""Sinks in front of vLLM's CPU backend (vllm/v1/attention/backends/cpu_attn.py)."""

from typing import ClassVar

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_sink.attention.cpu import cpu_attention
from vllm_sink.attention.interface import Attention
from vllm_sink.plugin.backend import SinkAttentionImpl, SinkBackend, SinkMetadataBuilder


class CPUSinkMetadataBuilder(SinkMetadataBuilder, CPUAttentionMetadataBuilder):
    pass


class CPUSinkAttentionImpl(SinkAttentionImpl, CPUAttentionBackendImpl):
    no_window: ClassVar = -1

    def make_attention(self) -> Attention:
        return cpu_attention()


class CPUSinkBackend(SinkBackend, CPUAttentionBackend):
    impl_cls = CPUSinkAttentionImpl
    builder_cls = CPUSinkMetadataBuilder

"""Sinks in front of vLLM's Triton backend (vllm/v1/attention/backends/triton_attn.py)."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention import Attention as AttentionLayer
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_sink.attention.interface import Attention, KVCache
from vllm_sink.attention.triton import TritonAttention
from vllm_sink.plugin.backend import SinkAttentionImpl, SinkBackend, SinkMetadataBuilder
from vllm_sink.plugin.check import CACHE_DTYPES
from vllm_sink.plugin.spec import SinkSpec


class GPUSinkMetadataBuilder(SinkMetadataBuilder, TritonAttentionMetadataBuilder):
    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """The parent shortens streams, for which it takes its own metadata; ours are bounded."""
        if isinstance(self.kv_cache_spec, SinkSpec):
            return self.build(0, common_attn_metadata)
        return super().build_for_cudagraph_capture(common_attn_metadata)


class GPUSinkAttentionImpl(SinkAttentionImpl, TritonAttentionImpl):
    no_window: ClassVar = (-1, -1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Queries stay as they are beside keys in FP8: they are yet to be turned.
        self.supports_quant_query_input = False

    def make_attention(self) -> Attention:
        return TritonAttention(current_platform.num_compute_units())

    def cache_of(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> KVCache:
        if self.kv_cache_dtype == "auto":
            return super().cache_of(layer, kv_cache)
        cache = self.attention.as_cache(kv_cache.view(self.fp8_dtype))
        return replace(cache, key_scale=layer._k_scale, value_scale=layer._v_scale)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False


class GPUSinkBackend(SinkBackend, TritonAttentionBackend):
    impl_cls = GPUSinkAttentionImpl
    builder_cls = GPUSinkMetadataBuilder

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    # What the parent's kernel can do and ours cannot.
    supported_kv_cache_dtypes: ClassVar = list(CACHE_DTYPES["cuda"])
    supports_alibi_sqrt = AttentionBackend.supports_alibi_sqrt
    supports_attn_type = AttentionBackend.supports_attn_type
    supports_mm_prefix = AttentionBackend.supports_mm_prefix
    supports_non_causal = AttentionBackend.supports_non_causal
    supports_rswa = AttentionBackend.supports_rswa
    # The fewer the streams of a step, the more splits, and each rounds sums elsewhere.
    supports_batch_invariance = AttentionBackend.supports_batch_invariance

"""Seam: vLLM's CPU attention backend, overridden through `register_backend`.

Source: vllm/v1/attention/backends/cpu_attn.py. Without sink settings every class handed out is
vLLM's own; with them, layers that have a sliding window of their own keep vLLM's kernel.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_sink.attention.cpu import cpu_attention
from vllm_sink.attention.interface import Batch, Scoring, SinkTurn
from vllm_sink.geometry import Geometry
from vllm_sink.plugin.config import current_settings, settings_of
from vllm_sink.plugin.rotary import UnboundedRotary, rotary_of
from vllm_sink.plugin.spec import SinkSpec
from vllm_sink.rotary import cos_sin
from vllm_sink.settings import SettingsError, SinkSettings


@dataclass
class SinkMetadata:
    """One step's batch, shared by all layers of a KV cache group."""

    batch: Batch
    geometry: Geometry
    turns: dict[str, SinkTurn]
    """By layer name; empty while nothing has been evicted from any stream of the batch."""


class SinkMetadataBuilder(CPUAttentionMetadataBuilder):
    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        rotaries = {name: _rotary_or_refuse(name, layer) for name, layer in layers.items()}
        settings = settings_of(vllm_config)
        assert settings is not None
        self.turned = {
            name: rotary for name, rotary in rotaries.items() if rotary and settings.reindex
        }

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata | SinkMetadata:
        if not isinstance(self.kv_cache_spec, SinkSpec):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        geometry = self.kv_cache_spec.geometry
        batch = Batch(
            common_attn_metadata.query_start_loc,
            common_attn_metadata.seq_lens,
            common_attn_metadata.block_table_tensor,
            common_attn_metadata.max_query_len,
        )
        return SinkMetadata(batch, geometry, self._turns(batch, geometry))

    def _turns(self, batch: Batch, geometry: Geometry) -> dict[str, SinkTurn]:
        if not geometry.sinks or not geometry.evicted(int(batch.seq_lens.max()) - 1):
            return {}
        evicted = (_positions(batch) + 1 - geometry.window - geometry.sinks).clamp(min=0)
        turns = {
            rotary: SinkTurn(cos_sin(-evicted, rotary.inv_freq), rotary.is_neox_style)
            for rotary in set(self.turned.values())
        }
        return {name: turns[rotary] for name, rotary in self.turned.items()}


class SinkAttentionImpl(CPUAttentionBackendImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = current_settings()
        assert settings is not None
        if self.sinks is not None:
            raise SettingsError(
                f"sink.policy={settings.policy!r}: this model's attention has learned sinks; "
                "accepted are models without them"
            )
        self.scoring = Scoring(
            self.scale, self.logits_soft_cap, self.alibi_slopes, settings.reindex
        )
        self.attention = cpu_attention()

    @property
    def has_own_window(self) -> bool:
        return self.sliding_window != -1

    def forward(
        self,
        layer: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in the parent, with `query` [tokens, heads, head_size] written to `output`."""
        if self.has_own_window or attn_metadata is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        self.attention.attend(
            query,
            self.attention.as_cache(kv_cache),
            attn_metadata.batch,
            attn_metadata.geometry,
            self.scoring,
            attn_metadata.turns.get(layer.layer_name),
            output,
        )
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.has_own_window:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            self.attention.write(key, value, self.attention.as_cache(kv_cache), slot_mapping)


class SinkBackend(CPUAttentionBackend):
    """Hands out vLLM's classes or ours, by the settings of the engine being built."""

    settings: ClassVar[SinkSettings | None] = None
    """Kept from the last place that runs inside vLLM's config context, `get_impl_cls`."""

    @classmethod
    def get_impl_cls(cls) -> type[CPUAttentionBackendImpl]:
        cls.settings = current_settings()
        evicts = cls.settings is not None and cls.settings.evicts
        return SinkAttentionImpl if evicts else CPUAttentionBackendImpl

    @classmethod
    def get_builder_cls(cls) -> type[CPUAttentionMetadataBuilder]:
        return CPUAttentionMetadataBuilder if cls.settings is None else SinkMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if cls.settings is None or not cls.settings.evicts:
            return spec
        if not isinstance(spec, FullAttentionSpec):
            return spec
        return SinkSpec.of(spec, cls.settings)


def register() -> None:
    """The CPU platform always picks CPU_ATTN (vllm/platforms/cpu.py), so that is overridden."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{SinkBackend.__name__}")


def _positions(batch: Batch) -> torch.Tensor:
    """The stream position of every query of the step: [tokens] int64."""
    starts, stops = batch.query_start_loc[:-1].long(), batch.query_start_loc[1:].long()
    shift = torch.repeat_interleave(batch.seq_lens.long() - stops, stops - starts)
    return torch.arange(len(shift), device=shift.device) + shift


def _rotary_or_refuse(name: str, layer: Attention) -> UnboundedRotary | None:
    """The rotary embedding whose positions sinks are turned back by; None for ALiBi."""
    rotary = rotary_of(layer)
    if rotary is None and layer.impl.alibi_slopes is None:
        raise SettingsError(
            f"sink: layer {name} has no position encoding that works without an upper position; "
            "accepted are ALiBi and rotary embeddings of type default, linear, dynamic, llama3, "
            "yarn and longrope"
        )
    return rotary

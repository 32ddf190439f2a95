"""Seam: attention backends registered through `register_backend`; what ours share.

Each stands in front of one of vLLM's own. Without sink settings every class handed out is vLLM's;
with them, layers that have a sliding window of their own keep vLLM's kernel.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention as AttentionLayer
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_sink.attention.interface import Attention, Batch, KVCache, Scoring, SinkTurn
from vllm_sink.geometry import Geometry
from vllm_sink.plugin.check import CACHE_DTYPES
from vllm_sink.plugin.config import current_settings, settings_of
from vllm_sink.plugin.probe import turn_of
from vllm_sink.plugin.rotary import Replacement
from vllm_sink.plugin.spec import SinkSpec
from vllm_sink.rotary import cos_sin
from vllm_sink.settings import SettingsError, SinkSettings


@dataclass
class SinkMetadata:
    """One step's batch, shared by all layers of a KV cache group."""

    batch: Batch
    geometry: Geometry
    turns: dict[str, SinkTurn]
    """By layer name; empty where sinks keep their stream distance."""


class SinkMetadataBuilder(AttentionMetadataBuilder[Any]):
    """Nothing here waits for the device. Rows lie in one buffer, whose address CUDA graphs hold."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayer, layer_names)
        turns = {name: turn for name, layer in layers.items() if (turn := turn_of(layer))}
        settings = settings_of(vllm_config)
        assert settings is not None
        has_turns = isinstance(kv_cache_spec, SinkSpec) and settings.sinks > 0 and settings.reindex
        self.turns = turns if has_turns else {}
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        rotaries = {turn.rotary for turn in turns.values()}
        self.step_rotaries = {rotary for rotary in rotaries if isinstance(rotary, Replacement)}
        for rotary in self.step_rotaries:
            rotary.keep_step_rows(tokens, rotary.table_dtype)
        self.rows = {
            rotary: torch.empty(tokens, rotary.rotary_dim, dtype=torch.float32, device=device)
            for rotary in {turn.rotary for turn in self.turns.values()}
        }

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """`SinkMetadata`, or the parent's for layers with a sliding window of their own."""
        batch = Batch(
            common_attn_metadata.query_start_loc,
            common_attn_metadata.seq_lens,
            common_attn_metadata.block_table_tensor,
            common_attn_metadata.max_query_len,
        )
        tokens = common_attn_metadata.num_actual_tokens
        positions = _positions(batch, tokens)
        for rotary in self.step_rotaries:
            rotary.begin_step(positions)
        if not isinstance(self.kv_cache_spec, SinkSpec):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        geometry = self.kv_cache_spec.geometry
        if common_attn_metadata.max_seq_len > geometry.window:
            evicted = (positions + 1 - geometry.window - geometry.sinks).clamp(min=0)
            for rotary, rows in self.rows.items():
                rows[:tokens] = cos_sin(-evicted, rotary.inv_freq)
        turns = {
            name: SinkTurn(self.rows[turn.rotary][:tokens], turn.is_neox_style)
            for name, turn in self.turns.items()
        }
        return SinkMetadata(batch, geometry, turns)


class SinkAttentionImpl(AttentionImpl[Any]):
    no_window: ClassVar[Any]
    """What `sliding_window` of the parent is in a layer without one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = current_settings()
        assert settings is not None
        # A checkpoint may ask for another one after the engine's config was checked.
        accepted = CACHE_DTYPES[current_platform.device_name]
        if self.kv_cache_dtype not in accepted:
            raise SettingsError(
                f"kv_cache_dtype={self.kv_cache_dtype}: asked for by the checkpoint; "
                f"accepted with sinks are {', '.join(accepted)}"
            )
        self.scoring = Scoring(
            self.scale, self.logits_soft_cap, self.alibi_slopes, reindex=settings.reindex
        )
        self.attention = self.make_attention()

    @abstractmethod
    def make_attention(self) -> Attention:
        """What computes layers without a window of their own."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.sinks is not None:
            self.scoring = replace(self.scoring, sink_logits=self.sinks.float())

    def cache_of(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> KVCache:
        return self.attention.as_cache(kv_cache)

    @property
    def has_own_window(self) -> bool:
        return bool(self.sliding_window != self.no_window)

    def forward(
        self,
        layer: AttentionLayer,
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
            self.cache_of(layer, kv_cache),
            attn_metadata.batch,
            attn_metadata.geometry,
            self.scoring,
            attn_metadata.turns.get(layer.layer_name),
            output,
        )
        return output

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.has_own_window:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            self.attention.write(key, value, self.cache_of(layer, kv_cache), slot_mapping)


class SinkBackend(AttentionBackend):
    """Hands out the parent's classes or ours, by the settings of the engine being built."""

    impl_cls: ClassVar[type[SinkAttentionImpl]]
    builder_cls: ClassVar[type[SinkMetadataBuilder]]
    settings: ClassVar[SinkSettings | None] = None
    """Kept from the last place that runs inside vLLM's config context, `get_impl_cls`."""

    @classmethod
    def get_impl_cls(cls) -> type[Any]:
        cls.settings = current_settings()
        evicts = cls.settings is not None and cls.settings.evicts
        return cls.impl_cls if evicts else super().get_impl_cls()

    @classmethod
    def get_builder_cls(cls) -> type[Any]:
        return super().get_builder_cls() if cls.settings is None else cls.builder_cls

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        spec = super().customize_spec(spec)
        if cls.settings is None or not cls.settings.evicts:
            return spec
        if not isinstance(spec, FullAttentionSpec):
            return spec
        return SinkSpec.of(spec, cls.settings)


def register() -> None:
    """The CPU platform always picks CPU_ATTN (vllm/platforms/cpu.py), so that is overridden; on a
    GPU ours has to be asked for. By name: neither is loaded where it is not used.
    """
    register_backend(AttentionBackendEnum.CPU_ATTN, "vllm_sink.plugin.cpu_backend.CPUSinkBackend")
    register_backend(AttentionBackendEnum.CUSTOM, "vllm_sink.plugin.gpu_backend.GPUSinkBackend")


def _positions(batch: Batch, tokens: int) -> torch.Tensor:
    """The stream position of each of the step's `tokens`: [tokens] int64; of padding, any."""
    stops, token = batch.query_start_loc[1:], torch.arange(tokens, device=batch.seq_lens.device)
    request = torch.searchsorted(stops.long(), token, right=True).clamp(max=len(stops) - 1)
    return token + (batch.seq_lens - stops)[request]

"""Seam: vLLM's rotary layers, replaced through `CustomOp.register_oot` by unbounded ones.

Sources: vllm/model_executor/custom_op.py and vllm/model_executor/layers/rotary_embedding/.
"""

from abc import abstractmethod
from functools import cache
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding import (
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Gemma4RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    MRotaryEmbedding,
    NTKScalingRotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
from vllm.platforms import current_platform

from vllm_sink.plugin.config import current_settings
from vllm_sink.rotary import cos_sin
from vllm_sink.settings import SettingsError


class UnboundedRotary(nn.Module):
    """What every replacement offers: its frequencies, and rows for any position."""

    inv_freq: torch.Tensor
    """float32 [rotary_dim / 2], radians a token; scaling is in it."""
    magnitude: float
    """Factor on cosines and sines (YaRN, longrope); 1 elsewhere."""
    rotary_dim: int
    step_rows: torch.Tensor | None
    """[max_num_batched_tokens, rotary_dim]: rows of one step's tokens, where each layer would make
    them anew. One buffer, whose address CUDA graphs hold; none before `keep_step_rows`."""

    def keep(self, inv_freq: torch.Tensor, magnitude: float) -> None:
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("step_rows", None, persistent=False)
        self.register_buffer("step_places", None, persistent=False)
        self.magnitude = magnitude

    def rows(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`dtype` [n, rotary_dim], cos | sin; positions: int64, n elements in any shape."""
        return cos_sin(positions.flatten(), self.inv_freq, self.magnitude, dtype)

    def keep_step_rows(self, max_tokens: int, dtype: torch.dtype) -> None:
        """For who begins each step from now on; once done, again is to no effect.

        A graph that was compiled before, as vLLM's are, goes on making rows in its layers.
        """
        if self.step_rows is None:
            device = self.inv_freq.device
            self.step_rows = torch.zeros(max_tokens, self.rotary_dim, dtype=dtype, device=device)
            self.step_places = torch.arange(max_tokens, device=device)

    def begin_step(self, positions: torch.Tensor) -> None:
        """Make the rows that all layers of a step read; positions: int64 [n]."""
        assert self.step_rows is not None
        self.step_rows[: len(positions)] = self.rows(positions, self.step_rows.dtype)


class Replacement(UnboundedRotary):
    """Takes the place of its last base class, and turns into it where no sink is configured."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if current_settings() is None:
            self.__class__ = type(self).__bases__[-1]
            self.__init__(*args, **kwargs)  # type: ignore[misc]
            return
        super().__init__(*args, **kwargs)
        self.table_dtype = self.replace_table()

    @abstractmethod
    def replace_table(self) -> torch.dtype:
        """Delete the table, so that what reads it by position fails aloud; keep frequencies.

        Returns the table's dtype.
        """

    def _compute_cos_sin_cache(self, *args: Any) -> torch.Tensor:
        """The stock table without its memory: only its way to the frequencies is wanted."""
        with torch.device("meta"):
            table: torch.Tensor = super()._compute_cos_sin_cache(*args)
        return table


class UnboundedRotaryEmbedding(Replacement):
    """Replaces vLLM's `RotaryEmbedding` and its variants, combined with each."""

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        self.inv_freq_argument = base
        return super()._compute_inv_freq(base)

    def replace_table(self) -> torch.dtype:
        del self.cos_sin_cache
        inv_freq = super()._compute_inv_freq(self.inv_freq_argument)
        self.keep(inv_freq, getattr(self, "mscale", 1.0))
        return self.dtype

    def get_cos_sin(self, seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(seqlen, device=self.inv_freq.device)
        cos, sin = self.rows(positions, self.dtype).chunk(2, dim=-1)
        return cos, sin

    @classmethod
    def enabled(cls) -> bool:
        """On a GPU beside Inductor too, which may compute float64 angles anew for every head."""
        return current_platform.is_cuda() or super().enabled()

    def forward_native(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stock's traceable form, with a table of one row for each token."""
        rows, places = _rows_and_places(self, positions, query.dtype)
        turned: tuple[torch.Tensor, torch.Tensor | None] = RotaryEmbedding.forward_static(
            places, query, key, self.head_size, self.rotary_dim, rows, self.is_neox_style
        )
        return turned

    def forward_cuda(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _turn_in_place(self, positions, query, key)

    forward_cpu = forward_cuda
    forward_hip = forward_cuda
    forward_xpu = forward_native


class UnboundedLinearScaling(UnboundedRotaryEmbedding, LinearScalingRotaryEmbedding):
    """Scales frequencies where stock scales positions: the same angles."""

    def replace_table(self) -> torch.dtype:
        if len(self.scaling_factors) != 1:
            raise SettingsError(
                f"rope_parameters.factor={self.scaling_factors!r}: "
                "linear scaling with sinks takes a single factor"
            )
        dtype = super().replace_table()
        self.inv_freq /= self.scaling_factors[0]
        return dtype


class UnboundedMRotary(UnboundedRotaryEmbedding, MRotaryEmbedding):
    """Rotary in sections, of text: its positions are the same in each.

    positions: int64 [sections, tokens] or [tokens].
    """

    def forward_native(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().forward_native(_of_text(positions), query, key)

    def forward_cuda(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().forward_cuda(_of_text(positions), query, key)

    forward_cpu = forward_cuda
    forward_hip = forward_cuda
    forward_xpu = forward_native


class UnboundedLongRoPE(Replacement, Phi3LongRoPEScaledRotaryEmbedding):
    """Short or long factors by the positions that scores can see, not by `max_model_len`."""

    is_neox_style = True

    def replace_table(self) -> torch.dtype:
        dtype: torch.dtype = self.long_short_cos_sin_cache.dtype
        del self.long_short_cos_sin_cache
        self.use_long_rope = _visible_positions() > self.original_max_position_embeddings
        if self.use_long_rope:
            self.keep(self._compute_inv_freq(self.long_factor), self.long_mscale)
        else:
            self.keep(self._compute_inv_freq(self.short_factor), self.short_mscale)
        return dtype

    def forward(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _turn_in_place(self, positions, query, key)


OPS: tuple[type[UnboundedRotaryEmbedding], ...] = (
    UnboundedLinearScaling,
    UnboundedMRotary,
    *(
        type(f"Unbounded{stock.__name__}", (UnboundedRotaryEmbedding, stock), {})
        for stock in (
            RotaryEmbedding,
            NTKScalingRotaryEmbedding,
            DynamicNTKScalingRotaryEmbedding,
            DynamicNTKAlphaRotaryEmbedding,
            Llama3RotaryEmbedding,
            YaRNScalingRotaryEmbedding,
            Gemma4RotaryEmbedding,
        )
    ),
)


@cache
def register() -> None:
    """Put the replacements in place, once a process; without sink settings nothing changes."""
    for op in OPS:
        stock: Any = op.__bases__[-1]
        CustomOp.register_oot(op, name=stock.__name__)
        op.name = stock.name  # what `custom_ops` of the compilation config switches on and off
    rotary_embedding.Phi3LongRoPEScaledRotaryEmbedding = UnboundedLongRoPE
    rotary_embedding._ROPE_DICT = RopeDict()


class RopeDict(dict[tuple[Any, ...], nn.Module]):
    """`get_rope`'s cache, kept apart by engine: one process may build several, set differently."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__((key, _engine()))

    def __getitem__(self, key: tuple[Any, ...]) -> nn.Module:
        return super().__getitem__((key, _engine()))

    def __setitem__(self, key: tuple[Any, ...], rotary: nn.Module) -> None:
        super().__setitem__((key, _engine()), rotary)


def _engine() -> tuple[Any, ...] | None:
    """What rotaries of engines with sinks differ by; None where no sink is configured."""
    settings = current_settings()
    if settings is None:
        return None
    tokens = get_current_vllm_config().scheduler_config.max_num_batched_tokens
    return settings, _visible_positions(), tokens


def _visible_positions() -> int | None:
    """How many positions a score can span, or None where no sink is configured."""
    settings = current_settings()
    if settings is None:
        return None
    if settings.evicts:
        return settings.sinks + settings.window_tokens
    max_model_len: int = get_current_vllm_config().model_config.max_model_len
    return max_model_len


def _turn_in_place(
    rotary: UnboundedRotaryEmbedding | UnboundedLongRoPE,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turn query and key with vLLM's kernel for the platform."""
    rows, places = _rows_and_places(rotary, positions, query.dtype)
    # Heads in a dimension of their own are more than vLLM 0.32's kernel for CPUs gets right.
    flat_query, flat_key = query.flatten(1), None if key is None else key.flatten(1)
    ops.rotary_embedding(places, flat_query, flat_key, rotary.head_size, rows, rotary.is_neox_style)
    turned_key = None if key is None or flat_key is None else flat_key.view_as(key)
    return flat_query.view_as(query), turned_key


def _of_text(positions: torch.Tensor) -> torch.Tensor:
    return positions.view(-1, positions.shape[-1])[0]


def _rows_and_places(
    rotary: UnboundedRotary, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of a table and positions in it: a table of one row for each token."""
    if rotary.step_rows is None:
        rows = rotary.rows(positions, dtype)
        return rows, torch.arange(len(rows), device=rows.device)
    tokens = positions.numel()
    return rotary.step_rows[:tokens].to(dtype), rotary.step_places[:tokens]

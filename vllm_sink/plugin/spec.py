"""The KV cache spec of a layer with sinks and a window: what a stream costs in blocks."""

from dataclasses import dataclass

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, replace_as

from vllm_sink.geometry import Geometry, cdiv
from vllm_sink.settings import SinkSettings


class Window(int):
    """W tokens of ours: not equal to a window of a model's own, even if it is as long.

    By that vLLM keeps layers of the two kinds in groups apart, and only one kind has sinks to pin
    (`SlidingWindowSpec.is_uniform_with_collection`, vllm/v1/kv_cache_interface.py).
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Window) and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


@dataclass(frozen=True, kw_only=True)
class SinkSpec(SlidingWindowSpec):
    """A sliding window (W = `sliding_window`) whose first `sink_tokens` are never evicted.

    It descends from `SlidingWindowSpec` because vLLM grants only that family a per-stream
    admission bound (`get_manager_for_kv_cache_spec`, vllm/v1/core/single_type_kv_cache_manager.py).
    """

    sink_tokens: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, settings: SinkSettings) -> "SinkSpec":
        return replace_as(
            spec,
            cls,
            drop=("sliding_window", "attention_chunk_size", "non_causal"),
            sliding_window=Window(settings.window_tokens),
            sink_tokens=settings.sinks,
        )

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.sink_tokens, int(self.sliding_window))

    @property
    def num_retained_tokens(self) -> int:
        """0: no entry of a block table is to be nulled.

        vLLM 0.33's GPU worker nulls those below a sliding window, where sinks are, lest a tile of
        keys begin in a freed block; ours never do (vllm/v1/worker/gpu/block_table.py).
        """
        return 0

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """The true bound of a stream, in blocks, while a full batch of it is in flight."""
        return min(
            self.geometry.max_blocks(self.block_size, max_in_flight_tokens),
            cdiv(max_model_len, self.block_size),
        )

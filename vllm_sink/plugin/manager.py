"""Blocks of a stream: sinks pinned, middle blocks back to vLLM's own pool as the window passes."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sink.geometry import cdiv
from vllm_sink.plugin.reuse import Leaving, ReuseOrder
from vllm_sink.plugin.spec import SinkSpec

Blocks = list[KVCacheBlock]


class SinkManager(SlidingWindowManager):
    """vLLM's sliding-window manager, with the blocks that hold sink tokens kept.

    The parent treats the head of a stream as one run of evicted tokens. Here that run starts
    behind the sinks, at three places: eviction, a prefix-cache hit, and the count of blocks a
    hit takes out of the free queue.
    """

    def __init__(self, kv_cache_spec: SinkSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.geometry = kv_cache_spec.geometry
        self.sink_blocks = self.geometry.sink_blocks(self.block_size)
        self.reuse = ReuseOrder(self.block_pool)
        self.without_prompt: set[str] = set()
        """Streams read anew from their buffers: no other prompt ends where these do."""
        self.blocks_evicted = 0

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        dead = self.geometry.dead_blocks(processed_computed_tokens, self.block_size)
        leaving = self._leaving(request_id, dead, num_prompt_tokens)
        if not leaving:
            return
        self._remove_blocks_in_range(request_id, dead.start, dead.stop)
        self.blocks_evicted += len(leaving)
        self.reuse.leave(request_id, leaving)

    def leave_behind(self, request_id: str, num_prompt_tokens: int) -> None:
        """Free what a stream holds, to be read anew from a compacted buffer."""
        blocks = self.req_to_blocks[request_id]
        leaving = self._leaving(request_id, range(self.sink_blocks, len(blocks)), num_prompt_tokens)
        leaving += self.reuse.held_back(request_id)
        # Behind the sinks of a buffer's first block there is a window that no prompt has there.
        unlike_others = request_id in self.without_prompt
        leaving += [Leaving.of(block, not unlike_others) for block in blocks[: self.sink_blocks]]
        self.free(request_id)
        self.reuse.give_way(leaving)
        self.without_prompt.add(request_id)

    def pop_blocks_for_free(self, request_id: str) -> Blocks:
        self.reuse.end(request_id)
        self.without_prompt.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any) -> Blocks:
        held = len(self.req_to_blocks[request_id])
        self.reuse.make_room(cdiv(num_tokens, self.block_size) - held)
        return super().allocate_new_blocks(request_id, num_tokens, *args)

    def _leaving(self, request_id: str, places: range, prompt_tokens: int | None) -> list[Leaving]:
        """Those blocks of a stream that are not freed yet, oldest first."""
        blocks = self.req_to_blocks.get(request_id, [])
        needed = self._needed_by_prompt(request_id, prompt_tokens)
        leaving = []
        for place in reversed(range(places.start, min(places.stop, len(blocks)))):
            if blocks[place].is_null:
                break
            leaving.append(Leaving.of(blocks[place], place in needed))
        return leaving[::-1]

    def _needed_by_prompt(self, request_id: str, prompt_tokens: int | None) -> range:
        """Places of the blocks that the same prompt again would be a hit by."""
        if prompt_tokens is None or request_id in self.without_prompt:
            return range(0)
        end = (prompt_tokens - 1) // self.block_size
        start = self.geometry.window_start(end * self.block_size) // self.block_size
        return range(start, end)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[Blocks, ...], int]:
        """A hit needs the window before its end, and every sink before that window."""
        assert isinstance(kv_cache_spec, SinkSpec)
        block_size = kv_cache_spec.block_size
        sinks = _leading_cached_blocks(
            resolve_block_hashes(block_hashes, block_pool.hash_block_size, block_size),
            min(kv_cache_spec.geometry.sink_blocks(block_size), max_length // block_size),
            kv_cache_group_ids,
            block_pool,
        )
        if len(sinks) < kv_cache_spec.geometry.sink_blocks(block_size):
            max_length = len(sinks) * block_size
        hits, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            *args,
            **kwargs,
        )
        for group, blocks in enumerate(hits):
            pinned = [block[group] for block in sinks[: len(blocks)]]
            blocks[: len(pinned)] = pinned
        return hits, length

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        blocks = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        return blocks + self._get_num_evictable_blocks(
            self._sinks_behind_window(new_computed_blocks, total_computed_tokens)
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        self.reuse.used_again(new_computed_blocks)
        sinks = self._sinks_behind_window(new_computed_blocks, num_local_computed_tokens)
        self.block_pool.touch(sinks)
        self.req_to_blocks[request_id][: len(sinks)] = sinks

    def _sinks_behind_window(
        self, hit: Sequence[KVCacheBlock], computed_tokens: int
    ) -> Sequence[KVCacheBlock]:
        """Sink blocks of a hit that the parent takes for evicted."""
        skipped = self.get_num_skipped_tokens(computed_tokens) // self.block_size
        return hit[: min(self.sink_blocks, skipped)]

    @classmethod
    def reachable_block_mask(cls, *args: Any, **kwargs: Any) -> None:
        """None: every full block enters the prefix cache, as under full attention.

        The parent would follow `prefix_cache_retention_interval`, by default keeping only the end
        of each prompt; prompts that share a system prompt meet earlier than that.
        """
        return


def register() -> None:
    """Register spec and manager with vLLM's `KVCacheSpecRegistry`.

    The first registration suppresses vLLM's own, so a lookup fills the registry before it.
    """
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(SinkSpec, SinkManager, uniform_type_base_spec=SinkSpec)


def _leading_cached_blocks(
    block_hashes: BlockHashList, count: int, kv_cache_group_ids: list[int], block_pool: BlockPool
) -> list[Blocks]:
    """The first up to `count` blocks in the prefix cache, one block a group each."""
    found = []
    for index in range(count):
        cached = block_pool.get_cached_block(block_hashes[index], kv_cache_group_ids)
        if cached is None:
            break
        found.append(cached)
    return found

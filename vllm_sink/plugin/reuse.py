"""Which free blocks are written over first: those that no later prompt is likely to begin with.

vLLM writes over cached blocks in the order in which they became free. A stream would so push out,
one by one, whatever idle conversations left behind, with blocks from the middle of its own text.
Those give way first here: as long as there is room they stay in the prefix cache, for prompts that
share more than a window; once there is none, they go, oldest first, before all else that is cached.
"""

from collections.abc import Iterable
from typing import NamedTuple, Self

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock


class Leaving(NamedTuple):
    """A block that a stream lets go; it may be written over, and be another's, at any time."""

    block: KVCacheBlock
    block_hash: BlockHashWithGroupId | None
    """What it was found by as it left."""
    needed: bool
    """The same prompt again would be a hit by it."""

    @classmethod
    def of(cls, block: KVCacheBlock, needed: bool) -> Self:
        return cls(block, block.block_hash, needed)

    @property
    def is_free(self) -> bool:
        unchanged = self.block_hash is not None and self.block.block_hash == self.block_hash
        return unchanged and self.block.ref_cnt == 0


class ReuseOrder:
    """Of the blocks of one group of layers."""

    def __init__(self, block_pool: BlockPool) -> None:
        self.block_pool = block_pool
        self.first: dict[int, Leaving] = {}
        """By their ids, oldest first: what gives way."""
        self.last_out: dict[str, Leaving] = {}
        """Of each stream. The next turn of a conversation is a hit up to a block's end alone, so
        its window may begin a block earlier than the last one did."""

    def leave(self, request_id: str, blocks: list[Leaving]) -> None:
        """Blocks that a window left, and that are free now, oldest first."""
        *gone, self.last_out[request_id] = [*self.held_back(request_id), *blocks]
        self.give_way(gone)

    def held_back(self, request_id: str) -> list[Leaving]:
        """Of a stream, to be kept if it ends."""
        return [self.last_out[request_id]] if request_id in self.last_out else []

    def end(self, request_id: str) -> None:
        """What the stream still held stays in the cache, and what left it last."""
        self.last_out.pop(request_id, None)

    def give_way(self, blocks: Iterable[Leaving]) -> None:
        for leaving in blocks:
            self.first.pop(leaving.block.block_id, None)
            if leaving.is_free and not leaving.needed:
                self.first[leaving.block.block_id] = leaving

    def used_again(self, blocks: Iterable[KVCacheBlock]) -> None:
        """A prompt did begin with them."""
        for block in blocks:
            self.first.pop(block.block_id, None)

    def make_room(self, count: int) -> None:
        """See that the next `count` blocks to be written over are none that a prompt may need."""
        missing = count - self._without_hash(count)
        while missing > 0 and self.first:
            leaving = self.first.pop(next(iter(self.first)))
            if leaving.is_free:
                self.block_pool.touch([leaving.block])
                self.block_pool.evict_blocks({leaving.block.block_id})
                self.block_pool.free_blocks([leaving.block])  # without a hash: to the front
                missing -= 1

    def _without_hash(self, count: int) -> int:
        """How many of the next `count` blocks are in no prefix cache."""
        block = self.block_pool.free_block_queue.fake_free_list_head
        for found in range(count):
            block = block.next_free_block
            if block is None or block.block_hash is not None:
                return found
        return count

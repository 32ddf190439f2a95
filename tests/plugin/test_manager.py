"""Spec and manager on vLLM's real `KVCacheManager` and `BlockPool`, driven as a scheduler would."""

from collections import Counter
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from vllm_sink.geometry import Geometry
from vllm_sink.plugin import register
from vllm_sink.plugin.manager import SinkManager
from vllm_sink.plugin.spec import SinkSpec
from vllm_sink.settings import SinkSettings

BLOCK_SIZE = 4
MAX_MODEL_LEN = 4096
MAX_CHUNK = 16

register()
init_none_hash(sha256)
names = count()


def spec(geometry: Geometry) -> SinkSpec:
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    chosen = SinkSettings(sink_tokens=geometry.sinks, window_tokens=geometry.window)
    return SinkSpec.of(full, chosen)


def kv_cache_manager(geometry: Geometry, blocks: int, caching: bool = True) -> KVCacheManager:
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec(geometry))],
    )
    return KVCacheManager(
        config,
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        max_in_flight_tokens=MAX_CHUNK,
        enable_caching=caching,
    )


def request(tokens: list[int]) -> Request:
    return Request(
        request_id=str(next(names)),
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=MAX_MODEL_LEN),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def table(manager: KVCacheManager, stream: Request) -> list[KVCacheBlock]:
    blocks: list[KVCacheBlock] = manager.coordinator.get_blocks(stream.request_id)[0]
    return blocks


class Streams(RuleBasedStateMachine):
    """Many streams on one pool. `written` models the memory: the text up to each block's last
    token, so that a block handed back, reused or shared wrongly is caught by what it holds."""

    @initialize(
        sinks=st.integers(0, 9),
        window=st.integers(1, 18),
        blocks=st.integers(13, 60),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, sinks: int, window: int, blocks: int, caching: bool) -> None:
        self.geometry = Geometry(sinks, window)
        self.manager = kv_cache_manager(self.geometry, blocks, caching)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.texts: list[list[int]] = [[]]
        self.written: dict[int, list[int]] = {}

    @rule(
        data=st.data(),
        tail=st.lists(st.integers(0, 1), min_size=1, max_size=20),
    )
    def arrive(self, data: st.DataObject, tail: list[int]) -> None:
        """A prompt that begins like an earlier text: all of it, nothing, or up to any point."""
        texts = self.texts + [list(stream.all_token_ids) for stream in self.running]
        text = data.draw(st.sampled_from(texts))
        shared = data.draw(st.sampled_from([len(text), len(text) // 2, 0]))
        self.waiting.append(request(text[:shared] + tail))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), chunk=st.integers(1, MAX_CHUNK))
    def admit(self, data: st.DataObject, chunk: int) -> None:
        stream = data.draw(st.sampled_from(self.waiting))
        hit, hit_tokens, _ = self.manager.get_computed_blocks(stream)
        new = min(chunk, stream.num_tokens - hit_tokens)
        free = self.manager.block_pool.get_num_free_blocks()
        predicted = self.manager.coordinator.get_num_blocks_to_allocate(
            stream.request_id,
            num_tokens=hit_tokens + new,
            new_computed_blocks=hit.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=hit_tokens,
            num_local_computed_tokens=hit_tokens,
            num_tokens_main_model=hit_tokens + new,
        )
        allocated = self.manager.allocate_slots(
            stream, new, hit_tokens, hit, full_sequence_must_fit=True
        )
        if allocated is not None:
            assert free - self.manager.block_pool.get_num_free_blocks() == predicted
            self.waiting.remove(stream)
            self.running.append(stream)
            stream.num_computed_tokens = hit_tokens
            self.compute(stream, new)

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(),
        chunk=st.integers(1, MAX_CHUNK),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30),
    )
    def step(self, data: st.DataObject, chunk: int, tokens: list[int]) -> None:
        """The rest of a prompt in chunks, or some tokens of its answer one at a time."""
        stream = data.draw(st.sampled_from(self.running))
        for token in tokens:
            if stream.num_computed_tokens == stream.num_tokens:
                stream.append_output_token_ids(token)
            new = min(chunk, stream.num_tokens - stream.num_computed_tokens)
            if self.manager.allocate_slots(stream, new) is None:
                self.preempt(stream)
                return
            self.compute(stream, new)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Ended, aborted or hung up: to the manager it is the same."""
        stream = data.draw(st.sampled_from(self.running))
        self.running.remove(stream)
        self.texts.append(list(stream.all_token_ids))
        self.manager.free(stream)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.running))
        if stream.num_tokens <= self.geometry.sinks + self.geometry.window:
            return
        self.sinks_of_all().leave_behind(stream.request_id, stream.num_prompt_tokens)
        self.running.remove(stream)
        self.manager.free(stream)
        text = list(stream.all_token_ids)
        self.waiting.append(request(text[: self.geometry.sinks] + text[-self.geometry.window :]))

    def sinks_of_all(self) -> SinkManager:
        (manager,) = self.manager.coordinator.single_type_managers
        assert isinstance(manager, SinkManager)
        return manager

    def preempt(self, stream: Request) -> None:
        self.running.remove(stream)
        self.waiting.append(stream)
        self.manager.free(stream)
        stream.num_computed_tokens = 0

    def compute(self, stream: Request, new: int) -> None:
        first = stream.num_computed_tokens
        text = list(stream.all_token_ids)
        blocks = table(self.manager, stream)
        for j in self.geometry.visible(first)[:-1]:
            block = blocks[j // BLOCK_SIZE]
            assert not block.is_null, f"key {j} of query {first} was freed"
            assert self.written[block.block_id][: j + 1] == text[: j + 1]
        for t in range(first, first + new):
            block = blocks[t // BLOCK_SIZE]
            assert block.ref_cnt == 1, "written while shared"
            self.written[block.block_id] = text[: t + 1]
        stream.num_computed_tokens += new
        held = sum(not block.is_null for block in blocks)
        assert held <= self.geometry.max_blocks(BLOCK_SIZE, new)

    @invariant()
    def every_block_is_held_or_free(self) -> None:
        if not hasattr(self, "manager"):
            return
        pool = self.manager.block_pool
        holders = Counter(
            block.block_id
            for stream in self.running
            for block in table(self.manager, stream)
            if not block.is_null
        )
        for block in pool.blocks:
            assert block.is_null or block.ref_cnt == holders[block.block_id]
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(holders)
        assert len(pool.free_block_queue.get_all_free_blocks()) == pool.get_num_free_blocks()

    def teardown(self) -> None:
        for stream in getattr(self, "running", []):
            self.manager.free(stream)
        if hasattr(self, "manager"):
            pool = self.manager.block_pool
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


TestStreams = Streams.TestCase
TestStreams.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def advance(manager: KVCacheManager, stream: Request, chunk: int) -> int:
    """Compute the rest of a stream in chunks; the most blocks it held at once."""
    held = 0
    while stream.num_computed_tokens < stream.num_tokens:
        new = min(chunk, stream.num_tokens - stream.num_computed_tokens)
        assert manager.allocate_slots(stream, new) is not None
        stream.num_computed_tokens += new
        held = max(held, sum(not block.is_null for block in table(manager, stream)))
    return held


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (5, 13), (0, 1), (9, 7)])
def test_a_long_stream_reaches_its_bound_and_stays_below(
    sinks: int, window: int, chunk: int
) -> None:
    geometry = Geometry(sinks, window)
    manager = kv_cache_manager(geometry, blocks=40, caching=False)
    stream = request([0] * 600)
    bound = geometry.max_blocks(BLOCK_SIZE, chunk)
    held = advance(manager, stream, chunk)
    assert held <= bound
    assert held == bound or chunk > 1


def test_admission_takes_the_true_bound() -> None:
    """A pool that holds one stream admits one of any length, and no second beside it."""
    geometry = Geometry(5, 13)
    manager = kv_cache_manager(
        geometry, blocks=1 + geometry.max_blocks(BLOCK_SIZE, MAX_CHUNK), caching=False
    )
    first, second = request([0] * 2000), request([1] * 2000)
    assert manager.allocate_slots(first, MAX_CHUNK, full_sequence_must_fit=True) is not None
    first.num_computed_tokens = MAX_CHUNK
    assert manager.allocate_slots(second, MAX_CHUNK, full_sequence_must_fit=True) is None
    advance(manager, first, MAX_CHUNK)


def test_a_hit_needs_every_sink() -> None:
    """With one sink block gone from the prefix cache, blocks behind it are out of reach."""
    geometry = Geometry(6, 12)
    manager = kv_cache_manager(geometry, blocks=60)
    first, again = request([0, 1] * 60), request([0, 1] * 60)
    advance(manager, first, chunk=8)
    sinks = table(manager, first)[:2]
    manager.free(first)
    hit, hit_tokens, _ = manager.get_computed_blocks(again)
    assert hit_tokens == 116
    assert list(hit.blocks[0][:2]) == sinks
    manager.block_pool.evict_blocks({sinks[1].block_id})
    assert manager.get_computed_blocks(again)[1] == BLOCK_SIZE


POOL = 60
TEN_POOLS = 10 * POOL * BLOCK_SIZE


@pytest.mark.parametrize("ended", range(4 * BLOCK_SIZE, 5 * BLOCK_SIZE))
@pytest.mark.parametrize(("sinks", "window"), [(4, 13), (5, 12), (3, 15), (0, 14)])
@pytest.mark.parametrize("prompt", [8, TEN_POOLS], ids=["written", "read"])
def test_an_idle_conversation_s_next_turn_is_a_hit(
    sinks: int, window: int, ended: int, prompt: int
) -> None:
    """After ten pools' worth of another stream's tokens; and its prompt again is one, too."""
    manager = kv_cache_manager(Geometry(sinks, window), POOL)
    turn = request([0] * 30 + [1] * 20 * BLOCK_SIZE)
    talk(manager, turn, ended)
    other = request([2] * prompt)
    talk(manager, other, TEN_POOLS - prompt)
    again, regenerated = request([*turn.all_token_ids, 3, 3, 3]), request([*turn.prompt_token_ids])
    assert manager.get_computed_blocks(again)[1] == cached_end(turn.num_tokens)
    assert manager.get_computed_blocks(regenerated)[1] == cached_end(turn.num_prompt_tokens - 1)


def talk(manager: KVCacheManager, stream: Request, answer: int) -> None:
    """A prompt in chunks and an answer token by token; it ends, all of it computed."""
    advance(manager, stream, MAX_CHUNK)
    for _ in range(answer):
        stream.append_output_token_ids(stream.num_tokens % 7)
        advance(manager, stream, 1)
    manager.free(stream)


def cached_end(tokens: int) -> int:
    return tokens // BLOCK_SIZE * BLOCK_SIZE


def test_compacted_streams_push_nothing_out() -> None:
    """What a buffer was read anew for is no prompt's end, and neither is what it replaced."""
    manager = kv_cache_manager(Geometry(4, 13), POOL)
    (sinks,) = manager.coordinator.single_type_managers
    turn = request([0] * 30)
    talk(manager, turn, 9)
    prompt = request([1] * 60)
    advance(manager, prompt, MAX_CHUNK)
    held = list(prompt.all_token_ids)
    buffer = prompt
    for i in range(TEN_POOLS // 60):
        sinks.leave_behind(buffer.request_id, buffer.num_prompt_tokens)
        manager.free(buffer)
        held = held[:4] + held[-13:]
        buffer = request(list(held))
        sinks.without_prompt.add(buffer.request_id)
        hit, hit_tokens, _ = manager.get_computed_blocks(buffer)
        assert manager.allocate_slots(buffer, 17 - hit_tokens, hit_tokens, hit) is not None
        buffer.num_computed_tokens = 17
        for token in range(40):
            buffer.append_output_token_ids(i + token)
            advance(manager, buffer, 1)
        held = list(buffer.all_token_ids)
    assert manager.get_computed_blocks(request([1] * 60))[1] == 56
    again = request([*turn.all_token_ids, 3])
    assert manager.get_computed_blocks(again)[1] == cached_end(turn.num_tokens)


def test_what_two_prompts_share_stays_as_long_as_there_is_room() -> None:
    """More than a window of it, out of the middle of a longer prompt."""
    shared = list(range(50))
    manager = kv_cache_manager(Geometry(4, 13), POOL)
    talk(manager, request(shared + [0] * 100), 1)
    hit, hit_tokens, _ = manager.get_computed_blocks(request([*shared, 1]))
    assert hit_tokens == cached_end(len(shared))
    second = request([*shared, 1])
    assert manager.allocate_slots(second, 3, hit_tokens, hit) is not None
    manager.free(second)
    talk(manager, request([2] * 200), TEN_POOLS)
    # It was a hit, and so it is the end of a prompt by now.
    assert manager.get_computed_blocks(request([*shared, 1]))[1] == cached_end(len(shared))


def test_spec_bounds_memory_by_the_cache_and_not_by_the_capacity() -> None:
    bound = spec(Geometry(5, 13)).max_admission_blocks_per_request(
        max_in_flight_tokens=16, max_model_len=4_194_304
    )
    assert bound == 2 + (13 - 1 + 16 - 1 + 3) // 4 + 1
    assert spec(Geometry(5, 13)).max_admission_blocks_per_request(16, max_model_len=9) == 3


def test_a_model_s_own_window_of_the_same_size_is_another_group() -> None:
    own = SlidingWindowSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=13
    )
    layers = {"own": own, "ours": spec(Geometry(5, 13))}
    assert own.sliding_window != layers["ours"].sliding_window
    assert not UniformTypeKVCacheSpecs.is_uniform_type(layers)
    assert not UniformTypeKVCacheSpecs.is_uniform_type(dict(reversed(layers.items())))


def test_manager_is_ours() -> None:
    manager = kv_cache_manager(Geometry(4, 12), blocks=20)
    assert type(manager.coordinator.single_type_managers[0]) is SinkManager

"""Blocks that streams of a running engine hold, and that they come back."""

from typing import Any

import pytest

from vllm_sink.geometry import Geometry

from .conftest import Checkpoint, Engine
from .test_exact import prompts

pytestmark = pytest.mark.slow

GEOMETRY = Geometry(5, 97)
BLOCK_SIZE = 32
CHUNK = 48


def held(kv_cache_manager: Any) -> dict[str, int]:
    """Blocks each stream holds."""
    (manager,) = kv_cache_manager.coordinator.single_type_managers
    return {
        name: sum(not block.is_null for block in blocks)
        for name, blocks in manager.req_to_blocks.items()
    }


@pytest.mark.parametrize("caching", [False, True])
def test_streams_stay_bounded_and_give_everything_back(
    checkpoint: Checkpoint, engine: Engine, caching: bool
) -> None:
    from vllm import SamplingParams

    sink = {"sink_tokens": GEOMETRY.sinks, "window_tokens": GEOMETRY.window}
    options = {"max_num_batched_tokens": CHUNK, "enable_prefix_caching": caching}
    with engine(checkpoint(), sink, **options) as llm:
        core = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
        pool = core.block_pool
        for name, prompt in enumerate(prompts(700, 20, 300, 90, seed=6)):
            parameters = SamplingParams(max_tokens=300, ignore_eos=True, detokenize=False)
            llm.llm_engine.add_request(str(name), {"prompt_token_ids": prompt}, parameters)
        most = 0
        steps = 0
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            steps += 1
            if steps == 100:
                llm.llm_engine.abort_request(["3"])
                assert not any(name.startswith("3") for name in held(core))
            blocks = held(core).values()
            assert all(n <= GEOMETRY.max_blocks(BLOCK_SIZE, CHUNK) for n in blocks)
            decoding = steps > 60  # every prompt has been computed
            assert not decoding or all(n <= GEOMETRY.max_blocks(BLOCK_SIZE) for n in blocks)
            most = max(most, *blocks) if decoding and blocks else most
        assert most == GEOMETRY.max_blocks(BLOCK_SIZE)
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1

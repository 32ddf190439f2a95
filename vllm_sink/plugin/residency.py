"""How much of a stream the prefix cache holds, asked of an engine's core from its front end.

Seam: a utility call of `EngineCore` (vllm/v1/engine/core.py) by the name of a method. vLLM has no
call that looks tokens up; one would make this unnecessary.
"""

from typing import Any

from vllm import SamplingParams
from vllm.v1.request import Request

METHOD = "sink_resident_tokens"


def register() -> None:
    """In the process of an engine's core, where its class is loaded already."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, METHOD, resident_tokens)


def resident_tokens(core: Any, tokens: list[int], cache_salt: str | None) -> int:
    """How many first ones of `tokens` need not be computed to go on behind them."""
    if core.request_block_hasher is None:
        return 0
    request = Request(
        request_id="resident",
        prompt_token_ids=[*tokens, 0],
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        cache_salt=cache_salt,
        block_hasher=core.request_block_hasher,
    )
    coordinator = core.scheduler.kv_cache_manager.coordinator
    found: int = coordinator.find_longest_cache_hit(request.block_hashes, len(tokens))[1]
    return found


async def ask(engine_client: Any, tokens: list[int], cache_salt: str | None) -> int:
    """Of the engine, among those of a front end, that holds the most."""
    client = engine_client.engine_core
    return max(await client.call_utility_all_async(METHOD, tokens, cache_salt))

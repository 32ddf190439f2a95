"""Streams past `max_model_len`: the same tokens as buffers that are compacted by hand."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_sink.buffer import Buffer

from .conftest import VOCABULARY, Checkpoint, Engine, preempt_every
from .streaming_llm import StreamingLlama
from .test_exact import prompts

pytestmark = pytest.mark.slow

BUFFER = Buffer(4, 28, 80)
SINK = {"sink_tokens": 4, "window_tokens": 28, "compact_tokens": 80}
LENGTH = 128
BLOCKS = 3
"""That a stream holds, of 32 tokens."""
TOKENS = 3 * LENGTH
Endless = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(params=["sync", "async"])
def endless(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, engine: Engine
) -> Iterator[Endless]:
    """`with endless() as llm`: engines that schedule one way, and the other."""
    from vllm.platforms.cpu import CpuPlatform

    asynchronous = request.param == "async"
    stock = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, config: Any) -> None:
        """vLLM's, which takes asynchronous scheduling for useless on a CPU."""
        stock(cls, config)
        config.scheduler_config.async_scheduling = asynchronous

    @contextmanager
    def start(spread: float = 0.15, **arguments: Any) -> Iterator[Any]:
        """The less `spread` the model's weights have, the more equal all tokens are to it."""
        defaults = {"max_model_len": LENGTH, "max_num_batched_tokens": 48}
        model = checkpoint(initializer_range=spread)
        with engine(model, SINK, **(defaults | arguments)) as llm:
            assert llm.llm_engine.vllm_config.max_concurrent_batches == 1 + asynchronous
            yield llm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
        yield start


def parameters(**given: Any) -> Any:
    from vllm import SamplingParams

    defaults = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**(defaults | given))


def generate(llm: Any, texts: list[list[int]], adapter: Any = None, **given: Any) -> list[Any]:
    inputs = [{"prompt_token_ids": text} for text in texts]
    outputs = llm.generate(inputs, parameters(**given), use_tqdm=False, lora_request=adapter)
    return [output.outputs[0] for output in outputs]


def tokens_of(llm: Any, texts: list[list[int]], **given: Any) -> list[list[int]]:
    return [list(output.token_ids) for output in generate(llm, texts, **given)]


def by_hand(llm: Any, prompt: list[int], count: int, **given: Any) -> list[int]:
    """A client that compacts its own buffer and never lets the engine do it."""
    held, answer = list(prompt), []
    while len(answer) < count:
        room = max(1, BUFFER.mark - len(held))
        (new,) = tokens_of(llm, [held], max_tokens=room, **given)
        answer += new
        held = BUFFER.compact(held + new)
    return answer[:count]


def segments(prompt: list[int], answer: list[int]) -> Iterator[tuple[list[int], slice]]:
    """Buffers as they are full, and which part of the answer each ends with."""
    held, start = list(prompt), 0
    for place, token in enumerate(answer):
        held.append(token)
        if BUFFER.is_full(len(held)):
            yield held, slice(start, place + 1)
            held, start = BUFFER.compact(held), place + 1
    if start < len(answer):
        yield held, slice(start, len(answer))


@pytest.mark.parametrize("caching", [False, True])
def test_tokens_are_those_of_buffers_compacted_by_hand(endless: Endless, caching: bool) -> None:
    """Prompts shorter than the mark, longer, and as long as `max_model_len` allows."""
    texts = prompts(5, 100, LENGTH - 1, seed=1)
    with endless(enable_prefix_caching=caching) as llm:
        answers = tokens_of(llm, texts)
        assert [len(answer) for answer in answers] == [TOKENS] * len(texts)
        assert answers == [by_hand(llm, text, TOKENS) for text in texts]
        assert len(set(answers[0])) > VOCABULARY // 4
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_log_probabilities_are_those_of_buffers_in_float64(
    endless: Endless, checkpoint: Checkpoint
) -> None:
    (prompt,) = prompts(30, seed=2)
    with endless() as llm:
        (answer,) = generate(llm, [prompt], logprobs=0)
    tokens = list(answer.token_ids)
    seen = torch.tensor(
        [row[token].logprob for row, token in zip(answer.logprobs, tokens, strict=True)]
    )
    judge = StreamingLlama(checkpoint(initializer_range=0.15), BUFFER.sinks, BUFFER.window)
    compared = 0
    for held, part in segments(prompt, tokens):
        expected = judge.log_probs(held)[part.start - part.stop :]
        assert (seen[part] - expected).abs().max() < 1e-4
        compared += len(expected)
    assert compared == TOKENS


def test_pressure_and_company_change_nothing(endless: Endless) -> None:
    """Sixteen streams alone, together, in a pool for three, and preempted again and again."""
    texts = prompts(*range(3, 99, 6), seed=3)
    with endless(max_num_seqs=16) as llm:
        alone = [tokens_of(llm, [text], max_tokens=150)[0] for text in texts]
        assert tokens_of(llm, texts, max_tokens=150) == alone
        preemptions = preempt_every(llm, 20)
        assert tokens_of(llm, texts, max_tokens=150) == alone
        assert preemptions() > 20
    with endless(max_num_seqs=16, num_gpu_blocks_override=3 * BLOCKS + 1) as llm:
        assert tokens_of(llm, texts, max_tokens=150) == alone


def test_a_reset_of_the_prefix_cache_changes_nothing(endless: Endless) -> None:
    """At any step of a stream, and where its buffer fills the rows of a worker."""
    texts = prompts(20, BUFFER.mark - 1, seed=4)
    with endless(enable_prefix_caching=True, max_model_len=BUFFER.mark) as llm:
        undisturbed = tokens_of(llm, texts)
        engine = llm.llm_engine
        for name, text in enumerate(texts):
            engine.add_request(str(name), {"prompt_token_ids": text}, parameters())
        ended, steps = {}, 0
        while engine.has_unfinished_requests():
            steps += 1
            if steps % 3 == 0:
                engine.reset_prefix_cache(reset_running_requests=True)
            for output in engine.step():
                ended[int(output.request_id)] = list(output.outputs[0].token_ids)
        assert [ended[name] for name in range(len(texts))] == undisturbed


def test_streams_are_admitted_as_the_pool_can_hold_them(endless: Endless) -> None:
    """Sixty-four for sixteen: none preempts another, and each has its turn, in order."""
    texts = prompts(*[20] * 64, seed=5)
    arguments = {"max_num_seqs": 64, "max_num_batched_tokens": 64, "disable_log_stats": False}
    blocks = 16 * BLOCKS + 1
    with endless(enable_prefix_caching=True, num_gpu_blocks_override=blocks, **arguments) as llm:
        engine, started, counts = llm.llm_engine, [], []
        scheduler = engine.engine_core.engine_core.scheduler
        for name, text in enumerate(texts):
            engine.add_request(str(name), {"prompt_token_ids": text}, parameters())
        while engine.has_unfinished_requests():
            engine.step()
            running = [int(request.request_id.split("-")[0]) for request in scheduler.running]
            started += [name for name in running if name not in started]
            counts.append(len(running))
            # As long as none of them comes near its end, for which fewer blocks are enough.
            assert len(started) <= 16 or len(counts) > TOKENS - BUFFER.mark
        assert max(counts[: TOKENS - BUFFER.mark]) == 16
        assert started == sorted(started)
        assert len(started) == len(texts)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        assert metrics["vllm:num_preemptions"].value == 0
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_an_idle_conversation_is_still_a_hit_after_ten_pools(endless: Endless) -> None:
    """Of others' tokens: a long stream's that is compacted again and again, and a long prompt's."""
    pool = 12
    opening, long = prompts(40, LENGTH - 1, seed=14)
    with endless(enable_prefix_caching=True, num_gpu_blocks_override=pool + 1) as llm:
        (answer,) = tokens_of(llm, [opening], max_tokens=BUFFER.mark - 45)
        turn = [*opening, *answer]
        tokens_of(llm, [opening[::-1], long], max_tokens=5 * pool * 32)
        for text, cached in ((turn, len(turn) - 1), (opening, len(opening) - 1)):
            inputs = {"prompt_token_ids": text}
            (output,) = llm.generate(inputs, parameters(max_tokens=1), use_tqdm=False)
            assert output.num_cached_tokens == cached // 32 * 32


def test_short_requests_take_no_places_of_whole_windows(endless: Endless) -> None:
    with endless(max_num_seqs=8, num_gpu_blocks_override=8 + 1) as llm:
        engine = llm.llm_engine
        for name, text in enumerate(prompts(*[9] * 8, seed=6)):
            engine.add_request(str(name), {"prompt_token_ids": text}, parameters(max_tokens=20))
        engine.step()
        engine.step()
        assert len(engine.engine_core.engine_core.scheduler.running) == 8


def test_an_abort_at_any_step_gives_everything_back(endless: Endless) -> None:
    (text,) = prompts(30, seed=7)
    with endless() as llm:
        engine = llm.llm_engine
        scheduler = engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        for steps in range(BUFFER.mark - 36, BUFFER.mark - 24):
            engine.add_request("it", {"prompt_token_ids": text}, parameters())
            for _ in range(steps):
                engine.step()
            engine.abort_request(["it"])
            while scheduler.has_requests():
                engine.step()
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert tokens_of(llm, [text]) == [by_hand(llm, text, TOKENS)]


def test_a_seed_draws_on(endless: Endless) -> None:
    """Where all tokens are equal, they are the random numbers; nothing of them comes again."""
    (text,) = prompts(30, seed=8)
    with endless(spread=0.01, max_num_seqs=8) as llm:
        hot = {"temperature": 2.0, "seed": 7}
        (answer,) = tokens_of(llm, [text], **hot)
        assert tokens_of(llm, [text, *prompts(5, 9, seed=9)], **hot)[0] == answer
        period = BUFFER.mark - BUFFER.kept
        ends = range(BUFFER.mark - len(text), TOKENS - period, period)
        drawn = [answer[end : end + period] for end in ends] + [answer[:period]]
        for i, one in enumerate(drawn):
            for other in drawn[:i]:
                assert sum(a == b for a, b in zip(one, other, strict=True)) < period // 4
        several = llm.generate({"prompt_token_ids": text}, parameters(n=3, **hot), use_tqdm=False)
        outputs = [list(output.token_ids) for output in several[0].outputs]
        single = [tokens_of(llm, [text], **(hot | {"seed": 7 + i}))[0] for i in range(3)]
        assert outputs == single


def test_an_answer_ends_where_it_is_to(endless: Endless) -> None:
    """Stop tokens around a compaction, none before `min_tokens`, and limits at and beside it."""
    (text,) = prompts(30, seed=10)
    first = BUFFER.mark - len(text)
    with endless(spread=0.01) as llm:
        hot = {"temperature": 2.0, "seed": 3}
        (answer,) = tokens_of(llm, [text], **hot)
        for place in range(first - 3, first + 4):
            stop = answer[place]
            (ended,) = generate(llm, [text], stop_token_ids=[stop], **hot)
            assert list(ended.token_ids) == answer[: answer.index(stop) + 1]
            assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
            (cut,) = generate(llm, [text], max_tokens=place, **hot)
            assert list(cut.token_ids) == answer[:place]
            assert cut.finish_reason == "length"
        half = list(range(VOCABULARY // 2))
        least = 2 * first + 7
        (late,) = tokens_of(llm, [text], stop_token_ids=half, min_tokens=least, **hot)
        assert least < len(late) < least + 30
        assert not set(late[:least]) & set(half)


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 1.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.3}],
    ids=str,
)
def test_penalties_are_over_the_buffer(endless: Endless, penalty: dict[str, float]) -> None:
    """What was compacted is a prompt: of it, a repetition penalty counts, the others do not."""
    (text,) = prompts(30, seed=11)
    with endless() as llm:
        (answer,) = tokens_of(llm, [text], **penalty)
        assert answer == by_hand(llm, text, TOKENS, **penalty)
        assert answer != tokens_of(llm, [text])[0]


def test_log_probabilities_of_a_prompt_come_once(endless: Endless) -> None:
    (text,) = prompts(100, seed=12)
    with endless() as llm:
        (whole,) = llm.generate(
            {"prompt_token_ids": text}, parameters(prompt_logprobs=0), use_tqdm=False
        )
        (short,) = llm.generate(
            {"prompt_token_ids": text}, parameters(prompt_logprobs=0, max_tokens=1), use_tqdm=False
        )
    assert len(whole.prompt_logprobs) == len(text)
    assert whole.prompt_logprobs == short.prompt_logprobs
    assert len(whole.outputs[0].token_ids) == TOKENS


def test_an_adapter_goes_on(
    endless: Endless, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every stream: vLLM's CPU build, where some have none, is why it is refused there."""
    from vllm.lora.request import LoRARequest

    monkeypatch.setattr("vllm_sink.plugin.check._check_cpu_engine", lambda config: None)
    adapter = LoRARequest("an-adapter", 1, str(saved_adapter(tmp_path)))
    (text,) = prompts(30, seed=13)
    with endless(enable_lora=True, max_lora_rank=8) as llm:
        (answer,) = tokens_of(llm, [text], adapter=adapter)
        assert answer == by_hand(llm, text, TOKENS, adapter=adapter)
        assert answer[:10] != by_hand(llm, text, 10)


def saved_adapter(folder: Path) -> Path:
    """Random, on the queries of both layers."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 64,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    weights = {}
    for layer in (0, 1):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(8, 64)
        weights[f"{name}.lora_B.weight"] = torch.randn(128, 8)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder

"""vLLM's own front-end state of a request, fed token by token, with and without its past."""

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.detokenizer import SlowIncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.outputs import LogprobsLists

from vllm_sink import embedded
from vllm_sink.plugin import outputs
from vllm_sink.plugin.outputs import AT_ONCE, RecentTokens

TEXT = "Light is refracted, is it not? — Naïve readers… 光は屈折する。 " * 200
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 9)),
        st.tuples(st.just("extend"), st.integers(0, 9)),
        st.tuples(st.just("cut"), st.integers(0, 3)),
        st.tuples(st.just("forget"), st.integers(0, 20)),
    ),
    max_size=40,
)


@given(OPERATIONS)
def test_recent_tokens_are_a_list_without_its_beginning(operations: list[tuple[str, int]]) -> None:
    recent, whole, gone = RecentTokens([]), list[int](), 0
    for operation, value in operations:
        if operation == "append":
            recent.append(value)
            whole.append(value)
        elif operation == "extend":
            recent.extend([value] * value)
            whole.extend([value] * value)
        elif operation == "cut":
            index = max(gone, len(whole) - value)
            del recent[index:]
            del whole[index:]
        else:
            gone = max(gone, min(value, len(whole)))
            recent.forget_before(gone)
        assert len(recent) == len(whole)
        assert recent[gone:] == whole[gone:]
        if len(whole) > gone:
            assert recent[-1] == whole[-1]
            assert recent[gone] == whole[gone]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded.path())


Feed = Callable[..., tuple[list[Any], RequestState]]


@pytest.fixture
def feed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Feed:
    """Every output of a request that generates `TEXT`, and what is left of it."""

    def run(bounded: bool, interval: int = 1, **given: Any) -> tuple[list[Any], RequestState]:
        with monkeypatch.context() as patch:
            stock = unwrap(RequestState.make_request_output)
            patch.setattr(RequestState, "make_request_output", stock)
            if bounded:
                outputs.register()
            return _generate(
                tokenizer,
                interval,
                SamplingParams(**({"output_kind": RequestOutputKind.DELTA} | given)),
            )

    return run


def _generate(
    tokenizer: Any, interval: int, parameters: SamplingParams
) -> tuple[list[Any], RequestState]:
    processor = OutputProcessor(tokenizer, log_stats=False, stream_interval=interval)
    prompt = tokenizer.encode("Of Light: ")
    request = EngineCoreRequest(
        request_id="it-0",
        external_req_id="it",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=parameters,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    processor.add_request(request, None)
    state = processor.request_states["it-0"]
    tokens = tokenizer.encode(TEXT)
    seen = []
    for place, token in enumerate(tokens):
        last = place + 1 == len(tokens)
        logprobs = None
        if parameters.logprobs is not None:
            logprobs = LogprobsLists(np.array([[token]]), np.array([[-place / 7]]), np.array([1]))
        output = EngineCoreOutput(
            "it-0", [token], logprobs, finish_reason=FinishReason.LENGTH if last else None
        )
        made = processor.process_outputs([output]).request_outputs
        seen += made
        if made and made[-1].finished:
            break
    return seen, state


CASES = [
    {},
    {"interval": 7},
    {"logprobs": 0},
    {"logprobs": 0, "interval": 7},
    {"logprobs": 0, "flat_logprobs": True},
    {"stop": ["a phrase that never comes"]},
    {"stop": ["光は屈折しない", "a phrase that never comes"], "interval": 7},
    {"detokenize": False},
]


def told(seen: list[Any]) -> list[Any]:
    return [
        (
            output.outputs[0].text,
            list(output.outputs[0].token_ids),
            [dict(row) for row in output.outputs[0].logprobs or []],
            output.outputs[0].cumulative_logprob,
            output.finished,
        )
        for output in seen
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_stream_says_the_same_and_keeps_nothing(feed: Feed, case: dict[str, Any]) -> None:
    stock, _ = feed(bounded=False, **case)
    ours, state = feed(bounded=True, **case)
    assert told(ours) == told(stock)
    assert size(state) < 3 * AT_ONCE < len(TEXT)


def size(state: RequestState) -> int:
    detokenizer = state.detokenizer
    longest = max(len(detokenizer.token_ids.recent), len(getattr(detokenizer, "output_text", "")))
    return max(longest, len(state.logprobs_processor.logprobs or ()))


def test_a_stop_string_is_found_behind_what_was_forgotten(feed: Feed) -> None:
    case = {"stop": ["光は屈折する。 " * 150]}
    stock, _ = feed(bounded=False, **case)
    ours, _ = feed(bounded=True, **case)
    assert told(ours) == told(stock)


def test_an_answer_that_is_not_streamed_is_whole(feed: Feed) -> None:
    case = {"output_kind": RequestOutputKind.FINAL_ONLY, "logprobs": 0}
    stock, _ = feed(bounded=False, **case)
    ours, _ = feed(bounded=True, **case)
    assert told(ours) == told(stock)
    assert ours[0].outputs[0].text == TEXT


def test_tokenizers_in_python_forget_too(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.v1.engine.detokenizer.uses_fast_detokenizer", lambda tokenizer: False)
    for case in ({}, {"interval": 7}, {"logprobs": 0, "interval": 7}):
        stock, _ = feed(bounded=False, **case)
        ours, state = feed(bounded=True, **case)
        assert isinstance(state.detokenizer, SlowIncrementalDetokenizer)
        assert told(ours) == told(stock)
        assert max(size(state), len(state.detokenizer.tokens)) < 3 * AT_ONCE

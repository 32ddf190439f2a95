"""What a stream could not keep behind a mark is refused as the request comes."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_sink.plugin.requests import check, check_text


def parameters(**given: Any) -> SamplingParams:
    made = SamplingParams(**given)
    # As vLLM's `update_from_tokenizer` leaves it.
    made._bad_words_token_ids = [list(range(len(word.split()))) for word in made.bad_words or ()]
    return made


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"bad_words": ["one", "two words"]}, r"^bad_words=.*; accepted are words of one token, "),
        ({"thinking_token_budget": 9}, r"^thinking_token_budget=9: .*; accepted is none, or a "),
        ({"trace_decode_token_ids": [1]}, r"^trace_decode_token_ids=\[1\]: .*; accepted is none"),
    ],
    ids=str,
)
def test_what_counts_by_the_answer_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(VLLMValidationError, match=sentence):
        check(parameters(**given), mark=100)


@pytest.mark.parametrize(
    "given", [{}, {"bad_words": ["one"]}, {"seed": 3, "min_tokens": 2}], ids=str
)
def test_other_parameters_are_not(given: dict[str, Any]) -> None:
    check(parameters(**given), mark=100)


def test_more_than_text_is_refused() -> None:
    check_text(())
    features = [SimpleNamespace(modality=kind) for kind in ("video", "image", "image")]
    with pytest.raises(
        VLLMValidationError, match=r"^messages with image, video: .* accepted is text "
    ):
        check_text(features)

from argparse import Namespace
from typing import Any

import pytest

from vllm_sink.server.answers import set_default

CONTEXT = 256


@pytest.mark.parametrize(
    ("asked", "of_the_model", "expected"),
    [
        (None, {}, {"max_tokens": CONTEXT}),
        (None, {"max_tokens": 7}, {"max_tokens": 7}),
        (9, {}, {"max_tokens": 9}),
        (9, {"max_tokens": 7}, {"max_tokens": 9}),
        (0, {}, {}),
        (0, {"max_tokens": 7, "top_k": 2}, {"top_k": 2}),
    ],
    ids=str,
)
def test_the_user_comes_first_then_the_model(
    asked: int | None, of_the_model: dict[str, Any], expected: dict[str, Any]
) -> None:
    parameters = dict(of_the_model)
    set_default(parameters, Namespace(default_max_tokens=asked, trained_context=CONTEXT))
    assert parameters == expected

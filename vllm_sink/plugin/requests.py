"""Requests whose streams sinks could not keep right, refused as vLLM refuses bad ones.

Images and the like have positions of their own, which no place in a cache stands for. What vLLM
counts by an answer's tokens begins anew where a compaction makes them a prompt's: lengths and seeds
are put right (`compaction.continued`); what is not is refused, if the stream can come that far.
vLLM has no hook for a plugin to see requests, so `InputProcessor.process_inputs` is wrapped.
"""

from collections.abc import Callable, Iterable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from vllm_sink.plugin.config import settings_of
from vllm_sink.plugin.wrapping import wrap

NO_END = 2**31 - 1
"""Tokens of a stream that vLLM's int32 can count (vllm/v1/worker/gpu/states.py)."""
COUNTED = ("thinking_token_budget", "trace_decode_token_ids")
"""Parameters that are meant from an answer's first token on."""


def register() -> None:
    wrap(InputProcessor, "process_inputs", processed)


def processed(
    original: Callable[..., EngineCoreRequest],
    processor: InputProcessor,
    *args: Any,
    **kwargs: Any,
) -> EngineCoreRequest:
    request = original(processor, *args, **kwargs)
    settings, parameters = settings_of(processor.vllm_config), request.sampling_params
    if settings is None or not settings.evicts:
        return request
    check_text(request.mm_features or ())
    buffer = settings.buffer(processor.model_config.max_model_len)
    if buffer and parameters is not None:
        prompt = len(request.prompt_token_ids)
        parameters.max_tokens = min(parameters.max_tokens, NO_END - prompt)
        if buffer.compactions(prompt, prompt + parameters.max_tokens - 1):
            check(parameters, buffer.mark)
    return request


def check_text(features: Iterable[MultiModalFeatureSpec]) -> None:
    """Raise vLLM's error of a bad request, one sentence, if there is more than text."""
    kinds = sorted({feature.modality for feature in features})
    if kinds:
        raise VLLMValidationError(
            f"messages with {', '.join(kinds)}: not supported with sinks; accepted is text",
            parameter="messages",
        )


def check(parameters: SamplingParams, mark: int) -> None:
    """Raise vLLM's error of a bad request, one sentence, for a stream that reaches the mark."""
    for name in COUNTED:
        value = getattr(parameters, name, None)
        if value:
            _refuse(name, value, "none", mark)
    words = [word for word in parameters._bad_words_token_ids or () if len(word) > 1]
    if words:
        _refuse("bad_words", parameters.bad_words, "words of one token", mark)


def _refuse(name: str, value: Any, accepted: str, mark: int) -> None:
    raise VLLMValidationError(
        f"{name}={value}: not kept by a stream that is compacted at {mark} tokens; accepted "
        f"{'is' if accepted == 'none' else 'are'} {accepted}, or a max_tokens that ends it before",
        parameter=name,
        value=value,
    )

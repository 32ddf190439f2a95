"""One architecture, tiny and real: past its window in vLLM's engine, against float64."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_sink.models.reference import Model, StreamingModel
from vllm_sink.models.tiny import RECIPES, SIZES, save
from vllm_sink.plugin.probe import kind_of
from vllm_sink.settings import SettingsError

SINKS, WINDOW = 5, 59
CACHE = SINKS + WINDOW
LENGTH = 8 * CACHE
"""More than a stream comes to here, and than the models are said to be trained on."""
STEP = 40
"""Tokens a step takes: prompts come in chunks, beside streams that decode."""


def trial(architecture: str, folder: Path) -> dict[str, Any]:
    """With sinks: `layers` of each kind (plugin/probe.py), the largest `error` of a
    log-probability, and how many tokens a stream that goes on found `cached`; or why it was
    `refused`.
    """
    checkpoint = save(architecture, folder)
    sink = {"sink_tokens": SINKS, "window_tokens": WINDOW}
    try:
        llm = _engine(architecture, checkpoint, additional_config={"sink": sink})
    except SettingsError as error:
        return {"refused": str(error).replace(repr(str(checkpoint)), repr("tiny"))}
    fresh = _generate(llm, [_prompt(3 * CACHE, seed=1), _prompt(CACHE - 20, seed=2)], CACHE + 8)
    again = _tokens(fresh[0]) + _prompt(20, seed=3)
    (resumed,) = _generate(llm, [again], 24, score_prompt=False)
    reference = StreamingModel(checkpoint, SINKS, WINDOW)
    return {
        "layers": _layers(llm),
        "error": max(_error(output, reference) for output in (*fresh, resumed)),
        "cached": resumed.num_cached_tokens,
    }


def stock(architecture: str, folder: Path) -> dict[str, Any]:
    """Without sinks, on a text that fits: the `error` that is not ours to mend."""
    checkpoint = save(architecture, folder)
    (output,) = _generate(_engine(architecture, checkpoint), [_prompt(CACHE, seed=1)], 24)
    return {"error": _error(output, Model(checkpoint))}


def _engine(architecture: str, checkpoint: Path, **arguments: Any) -> LLM:
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "block_size": 32,
        "max_model_len": LENGTH,
        "max_num_seqs": 4,
        "max_num_batched_tokens": STEP,
        "enable_prefix_caching": True,
    }
    return LLM(str(checkpoint), **(defaults | RECIPES[architecture].engine | arguments))


def _prompt(length: int, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab_size"], (length,), generator=random).tolist()


def _generate(
    llm: Any, prompts: list[list[int]], tokens: int, score_prompt: bool = True
) -> list[Any]:
    parameters = SamplingParams(
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0 if score_prompt else None,
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(requests, parameters, use_tqdm=False)


def _tokens(output: Any) -> list[int]:
    return [*output.prompt_token_ids, *output.outputs[0].token_ids]


def _error(output: Any, reference: Model) -> float:
    """Of all tokens that were scored: the answer, and the prompt but its first if asked for."""
    scored = (output.prompt_logprobs or [])[1:] + output.outputs[0].logprobs
    tokens = _tokens(output)
    pairs = zip(tokens[-len(scored) :], scored, strict=True)
    got = torch.tensor([of[token].logprob for token, of in pairs], dtype=torch.float64)
    return float((got - reference.log_probs(tokens)[-len(got) :]).abs().max())


def _layers(llm: Any) -> dict[str, int]:
    layers = get_layers_from_vllm_config(llm.llm_engine.vllm_config, AttentionLayerBase)
    return dict(Counter(map(kind_of, layers.values())))

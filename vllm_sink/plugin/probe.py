"""What each attention layer does with positions, measured on the model as it was loaded.

The same tokens go through the model at several positions, while its attention notes what it is
given and answers zeros: then nothing but the position differs. A query can be turned back for its
sinks if it turns with the position exactly as one of the model's rotary embeddings says, or not at
all.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backend import AttentionType

from vllm_sink.plugin.check import trained_context
from vllm_sink.plugin.rotary import UnboundedRotary
from vllm_sink.plugin.scaling import Scale
from vllm_sink.rotary import cos_sin, rotate
from vllm_sink.settings import SettingsError

TOKENS = 16
NEAR = (7, 131)
FAR = (10_007, 1_000_003)
"""Where a scaling by position shows. A model that got here reads no table of positions."""
ROUNDING = {torch.float32: 1e-5, torch.float16: 0.004, torch.bfloat16: 0.03}
"""How far from exact a turn may be, over the largest component of what is turned."""
ACCEPTED = (
    "accepted with sinks are layers that turn queries and keys by a rotary embedding of vLLM's, in "
    "their first dimensions, and layers without positions or with ALiBi"
)


@dataclass(frozen=True)
class Turn:
    """How a layer turns queries and keys with the position."""

    rotary: UnboundedRotary
    is_neox_style: bool


_turns: WeakKeyDictionary[nn.Module, Turn | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class Given:
    """What a layer was given, each [tokens, heads, head_size]; no keys where layers share them."""

    query: torch.Tensor
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None


def kind_of(layer: AttentionLayerBase) -> str:
    """What a layer of a probed model does with positions and the past, in a word or two."""
    if isinstance(layer, MambaBase):
        return "a state"
    if layer.impl.alibi_slopes is not None:
        kinds = ["ALiBi"]
    else:
        kinds = ["rotated" if turn_of(layer) else "no positions"]
    if layer.impl.sinks is not None:
        kinds.append("a learned sink")
    if layer.sliding_window is not None:
        kinds.append("a window of its own")
    return ", ".join(kinds)


def turn_of(layer: nn.Module) -> Turn | None:
    """Of a probed layer; None where it has ALiBi or no positions."""
    return _turns[layer]


def probe(
    model: nn.Module, vllm_config: VllmConfig, device: torch.device, scales: Mapping[str, Scale]
) -> None:
    """Find the turn of each attention layer; all workers of a model do so at once.

    scales: by which modules of the model scale queries, known and right (plugin/scaling.py).
    Raises `SettingsError`, one sentence, on a layer that sinks would get wrong.
    """
    layers = _decoder_layers(vllm_config)
    states = get_layers_from_vllm_config(vllm_config, MambaBase)
    run = partial(_run, model, vllm_config, layers, [*states.values()], device, scales)
    rotaries = [module for module in model.modules() if isinstance(module, UnboundedRotary)]
    turns = [Turn(rotary, is_neox) for rotary in rotaries for is_neox in (True, False)]
    fitting: dict[str, list[Turn | None]] = {name: [None, *turns] for name in layers}
    given, returned = run(0)
    for name in layers.keys() - given.keys():
        _refuse(vllm_config, name, "is not reached by text alone")
    model_config = vllm_config.model_config
    last = min(model_config.max_model_len, trained_context(model_config)) - 1
    for position in (*(min(near, last) for near in NEAR), *FAR):
        given_there, returned_there = run(position)
        for name in layers:
            one, other = given[name], given_there[name]
            if _differ(one.value, other.value):
                _refuse(vllm_config, name, "reads positions beside tokens, as if they were learned")
            fitting[name] = [t for t in fitting[name] if _fits(t, position, one, other)]
            if not fitting[name]:
                _refuse(
                    vllm_config, name, "changes queries or keys by position in a way of its own"
                )
        if any(map(_differ, returned, returned_there)):
            _refuse(vllm_config, None, "changes what it returns by position, beside attention")
    _turns.update({layer: fitting[name][0] for name, layer in layers.items()})


def _decoder_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    """All layers that read a cache of keys, by name. States of a MambaBase have no positions."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    found: dict[str, Attention] = {}
    for name, layer in layers.items():
        if isinstance(layer, MambaBase):
            continue
        if type(layer) is not Attention:
            _refuse(vllm_config, name, f"is of vLLM's class {type(layer).__name__}")
        if layer.attn_type != AttentionType.DECODER:
            _refuse(vllm_config, name, f"has attention of type {layer.attn_type}")
        if layer.head_size_v != layer.head_size:
            _refuse(
                vllm_config,
                name,
                f"has keys of {layer.head_size} and values of {layer.head_size_v} components",
            )
        found[name] = layer
    return found


def _run(
    model: nn.Module,
    vllm_config: VllmConfig,
    layers: dict[str, Attention],
    states: list[nn.Module],
    device: torch.device,
    scales: Mapping[str, Scale],
    position: int,
) -> tuple[dict[str, Given], list[torch.Tensor]]:
    """What layers were given, by name, and what the model returned, all tokens at a position."""
    model_config = vllm_config.model_config
    tokens = torch.arange(TOKENS, device=device) * (model_config.get_vocab_size() // TOKENS)
    positions = torch.full((TOKENS,), position, device=device)
    if model_config.uses_mrope:
        positions = positions.expand(3, -1)
    with (
        torch.inference_mode(),
        _noted(layers) as given,
        _silent(states),
        set_forward_context(None, vllm_config, TOKENS, skip_compiled=True),
    ):
        returned = model(
            input_ids=tokens,
            positions=positions,
            intermediate_tensors=_intermediate(model, model_config.dtype, device),
        )
    for name, seen in given.items():
        if scale := scales.get(name.rpartition(".")[0]):
            flat = seen.query.flatten(1) / scale(positions)
            given[name] = replace(seen, query=flat.view_as(seen.query).to(seen.query.dtype))
    if isinstance(returned, IntermediateTensors):
        returned = returned.tensors
    return given, [each for each in tree_leaves(returned) if isinstance(each, torch.Tensor)]


def _intermediate(
    model: nn.Module, dtype: torch.dtype, device: torch.device
) -> IntermediateTensors | None:
    """What a stage of a pipeline is given by the one before it: noise, the same each time."""
    if get_pp_group().is_first_rank:
        return None
    make: Callable[..., IntermediateTensors] = model.make_empty_intermediate_tensors
    tensors = make(batch_size=TOKENS, dtype=dtype, device=device)
    for tensor in tensors.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    return tensors


@contextmanager
def _noted(layers: dict[str, Attention]) -> Iterator[dict[str, Given]]:
    """By the name of each layer that runs meanwhile: what it was given; it answers zeros."""
    given: dict[str, Given] = {}

    def forward(
        layer: Attention,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        *args: Any,
        output: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        if key is None or value is None or layer.kv_sharing_target_layer_name:
            given[layer.layer_name] = Given(query.clone())
        else:
            given[layer.layer_name] = Given(query.clone(), key.clone(), value.clone())
        return output.zero_()

    for layer in layers.values():
        layer.impl.forward = forward
    try:
        yield given
    finally:
        for layer in layers.values():
            del layer.impl.forward


@contextmanager
def _silent(states: list[nn.Module]) -> Iterator[None]:
    """Without a state they answer what was in memory; meanwhile they answer zeros."""

    def answer(
        state: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any
    ) -> None:
        named = signature(state.forward).bind(*args, **kwargs).arguments
        for tensor in tree_leaves((named.get("output"), returned)):
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()

    hooks = [state.register_forward_hook(answer, with_kwargs=True) for state in states]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fits(turn: Turn | None, position: int, start: Given, then: Given) -> bool:
    """Whether what is given at a position is what is given at 0, turned; None: as it is."""
    if turn is None:
        return not (_differ(start.query, then.query) or _differ(start.key, then.key))
    if turn.rotary.rotary_dim > start.query.shape[-1]:
        return False
    positions = torch.full((TOKENS,), position, device=start.query.device)
    rows = cos_sin(positions, turn.rotary.inv_freq)

    def turned(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else rotate(x.float(), rows, turn.is_neox_style)

    return not (_differ(then.query, turned(start.query)) or _differ(then.key, turned(start.key)))


def _differ(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """By more than rounding in the dtype of `one`; what is no number differs from all."""
    if one is None or other is None:
        return False
    largest = other.abs().max()
    return not bool((one.float() - other).abs().max() <= ROUNDING[one.dtype] * largest)


def _refuse(vllm_config: VllmConfig, layer: str | None, what: str) -> None:
    who = f"its layer {layer}" if layer else "it"
    raise SettingsError(f"model={vllm_config.model_config.model!r}: {who} {what}; {ACCEPTED}")

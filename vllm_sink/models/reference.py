"""StreamingLLM in float64, from transformers' own model of a checkpoint.

At step t the method keeps n = min(t + 1, sinks + window) tokens: the first ones and the last. The
model runs on those n as on a plain text, at positions 0..n-1, but its attention layers are handed
the hidden states that each token had at its own step, so keys are what the paper (arXiv 2309.17453,
section 3.2) caches: made once, placed anew at every step, by the model's own code. The logits of a
step are its last row's; the other rows are there to be replaced.

All steps are one batch: what a token had at its own step is the last row of that step. Layers that
are bounded by themselves, with a state or a sliding window of their own, see all of the stream, in
place.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

ATTENTION = re.compile(r"(Attention|MLA)$")
PLACED = {"attention_mask", "position_embeddings", "position_ids"}
"""What an attention layer is handed that says where tokens are."""
SLIDING = "sliding_attention"
"""What transformers' configs call a layer with a window of its own."""
STATEFUL = re.compile(r"(Mixer|MambaLayer|GatedDeltaNet|DeltaAttention|ShortConv)$")
"""Classes of layers with a state or a convolution, which take no positions and all of a stream."""

EAGER_IS_WRONG = ("falcon",)
"""Models to which transformers adds ALiBi twice (5.19), in the mask and to the scores."""

ONE_MORE = ("cohere2", "cohere2_moe")
"""Models whose windows were trained with a token more than is configured, as vLLM has it."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Float64(TorchFunctionMode):
    """Wherever a model's code asks for float32, whatever its weights are, it gets float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


class Model:
    """A checkpoint that `AutoModelForCausalLM` loads, as it is."""

    def __init__(self, checkpoint: Path) -> None:
        config = AutoConfig.from_pretrained(checkpoint)
        if config.model_type in ONE_MORE:
            config.sliding_window += 1
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            config=config,
            dtype=torch.float64,
            attn_implementation="sdpa" if config.model_type in EAGER_IS_WRONG else "eager",
            experts_implementation="eager",
        )
        self.model = model.double().eval()

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probability of each token but the first, given those before it: [len - 1]."""
        return following(self._logits(torch.tensor([tokens[:-1]]))[0], tokens)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with Float64(), torch.inference_mode():
            return self.model(tokens, use_cache=False).logits


class StreamingModel(Model):
    """A checkpoint, its sinks and its window."""

    def __init__(self, checkpoint: Path, sinks: int, window: int) -> None:
        super().__init__(checkpoint)
        self.sinks, self.cache = sinks, sinks + window
        self.whole = Model(checkpoint)
        self.sliding = [module for module in self.whole.model.modules() if self._slides(module)]
        self.places: dict[int, dict[str, Any]] = {}
        """Of all of the stream, by layers with a sliding window."""
        for module in self.sliding:
            module.register_forward_pre_hook(self._note_places, with_kwargs=True)
        for module in self.model.modules():
            if STATEFUL.search(type(module).__name__) or self._slides(module):
                module.register_forward_pre_hook(self._whole_stream, with_kwargs=True)
                module.register_forward_hook(self._rows_of_stream)
            elif ATTENTION.search(type(module).__name__):
                module.register_forward_pre_hook(self._rows_of_steps, with_kwargs=True)

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probability of each token but the first, given those before it: [len - 1]."""
        steps = torch.arange(len(tokens) - 1)
        places = torch.arange(min(len(steps), self.cache))
        evicted = (steps - (self.cache - 1)).clamp(min=0)[:, None]
        # Early steps have fewer tokens than there are places: what repeats the last is after it.
        self.kept = (places + evicted * (places >= self.sinks)).minimum(steps[:, None])
        self.last = (steps, steps.clamp(max=len(places) - 1))
        if self.sliding:
            self.whole.log_probs(tokens)
        return following(self._logits(torch.tensor(tokens)[self.kept])[self.last], tokens)

    def _rows_of_steps(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        return with_hidden_states(args, kwargs, lambda rows: rows[self.last][self.kept])

    def _slides(self, module: Any) -> bool:
        types = getattr(self.model.config, "layer_types", None)
        is_attention = ATTENTION.search(type(module).__name__)
        return bool(is_attention and types and types[module.layer_idx] == SLIDING)

    def _note_places(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.places[module.layer_idx] = {name: kwargs[name] for name in PLACED & kwargs.keys()}

    def _whole_stream(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        if self._slides(module):
            kwargs = kwargs | self.places[module.layer_idx]
        return with_hidden_states(args, kwargs, lambda rows: rows[self.last][None])

    def _rows_of_stream(self, module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][0, self.kept], *output[1:])
        return output[0, self.kept]


def following(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def with_hidden_states(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    change: Callable[[torch.Tensor], torch.Tensor],
) -> Inputs:
    """A layer's inputs with other hidden states [batch, rows, width], by name or at their head."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

"""StreamingLLM written from the paper (arXiv 2309.17453, section 3.2), token by token in float64.

Keys are cached before rotation. At every step they are rotated at their positions in the cache, and
the query at its own: the plainest reading of the method, slow and shared with nothing it judges.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Cache = list[tuple[int, torch.Tensor, torch.Tensor]]
"""Of one layer: stream position, keys and values [kv_heads, head_dim] of each token kept."""


class StreamingLlama:
    """A Llama checkpoint, its sinks and its window."""

    def __init__(self, checkpoint: Path, sinks: int, window: int, reindex: bool = True) -> None:
        self.config = AutoConfig.from_pretrained(checkpoint)
        weights = load_file(checkpoint / "model.safetensors")
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.sinks, self.window, self.reindex = sinks, window, reindex
        self.inv_freq, self.magnitude = self._frequencies()

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probability of each token but the first, given those before it: [len - 1]."""
        caches: list[Cache] = [[] for _ in range(self.config.num_hidden_layers)]
        scores = [self._step(t, token, caches) for t, token in enumerate(tokens[:-1])]
        following = torch.tensor(tokens[1:])[:, None]
        return torch.stack(scores).log_softmax(-1).gather(1, following)[:, 0]

    def _frequencies(self) -> tuple[torch.Tensor, float]:
        rope = self.config.rope_parameters
        dim = self.config.head_dim
        if rope["rope_type"] == "default":
            exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
            return (1.0 / rope["rope_theta"] ** exponents).double(), 1.0
        inv_freq, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, "cpu")
        return inv_freq.double(), magnitude

    def _step(self, t: int, token: int, caches: list[Cache]) -> torch.Tensor:
        hidden = self.weights["model.embed_tokens.weight"][token]
        for layer, cache in enumerate(caches):
            prefix = f"model.layers.{layer}."
            hidden = hidden + self._attention(
                prefix + "self_attn.", t, cache, self._norm(prefix + "input_layernorm", hidden)
            )
            hidden = hidden + self._mlp(
                prefix + "mlp.", self._norm(prefix + "post_attention_layernorm", hidden)
            )
        return self.weights["lm_head.weight"] @ self._norm("model.norm", hidden)

    def _attention(self, prefix: str, t: int, cache: Cache, hidden: torch.Tensor) -> torch.Tensor:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        query, key, value = (
            (self.weights[f"{prefix}{name}_proj.weight"] @ hidden).view(-1, self.config.head_dim)
            for name in "qkv"
        )
        cache.append((t, key, value))
        if len(cache) > self.sinks + self.window:
            del cache[self.sinks]
        places = range(len(cache)) if self.reindex else [place for place, _, _ in cache]
        keys = torch.stack(
            [self._rotate(k, p) for p, (_, k, _) in zip(places, cache, strict=True)], dim=1
        ).repeat_interleave(heads // kv_heads, dim=0)
        values = torch.stack([v for _, _, v in cache], dim=1)
        values = values.repeat_interleave(heads // kv_heads, dim=0)
        scores = (keys @ self._rotate(query, places[-1])[..., None])[..., 0]
        weights = (scores * self.config.head_dim**-0.5).softmax(-1)
        mixed = (weights[:, None] @ values).flatten()
        return self.weights[f"{prefix}o_proj.weight"] @ mixed

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        angles = position * self.inv_freq
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _mlp(self, prefix: str, hidden: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.weights[f"{prefix}{x}_proj.weight"] for x in ("gate", "up", "down"))
        return down @ (torch.nn.functional.silu(gate @ hidden) * (up @ hidden))

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.square().mean() + self.config.rms_norm_eps)
        return hidden * scale * self.weights[f"{name}.weight"]

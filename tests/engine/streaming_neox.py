"""StreamingLLM in float64, token by token, for the other shape of decoder: attention and MLP side
by side, biases, fused projections; rotary on a part of each head (GPT-NeoX) or ALiBi (Falcon).

Written from the paper (arXiv 2309.17453, section 3.2): every step places the keys it kept anew.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, layer_norm
from transformers import AutoConfig

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Of one layer: keys and values [heads, head_dim] of each token kept, keys not rotated."""

NEOX = {
    "embedding": "gpt_neox.embed_in",
    "layer": "gpt_neox.layers.",
    "attention": "attention.",
    "mlp": "mlp.",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
FALCON = {
    "embedding": "transformer.word_embeddings",
    "layer": "transformer.h.",
    "attention": "self_attention.",
    "mlp": "mlp.",
    "attention_norm": "input_layernorm",
    "mlp_norm": "input_layernorm",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}


class StreamingNeoX:
    """A checkpoint of GPT-NeoX (partial rotary), or of Falcon with ALiBi and a KV head a head."""

    def __init__(self, checkpoint: Path, sinks: int, window: int) -> None:
        self.config = AutoConfig.from_pretrained(checkpoint)
        weights = load_file(checkpoint / "model.safetensors")
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.names = NEOX if self.config.model_type == "gpt_neox" else FALCON
        self.sinks, self.window = sinks, window
        self.heads = self.config.num_attention_heads
        self.head_dim = self.config.hidden_size // self.heads

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probability of each token but the first, given those before it: [len - 1]."""
        caches: list[Cache] = [[] for _ in range(self.config.num_hidden_layers)]
        scores = torch.stack([self._step(token, caches) for token in tokens[:-1]])
        return scores.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    def _step(self, token: int, caches: list[Cache]) -> torch.Tensor:
        names = self.names
        hidden = self.weights[f"{names['embedding']}.weight"][token]
        for layer, cache in enumerate(caches):
            prefix = f"{names['layer']}{layer}."
            attended = self._attention(
                prefix + names["attention"],
                cache,
                self._norm(prefix + names["attention_norm"], hidden),
            )
            mlp, normed = prefix + names["mlp"], self._norm(prefix + names["mlp_norm"], hidden)
            wide = gelu(self._linear(f"{mlp}dense_h_to_4h", normed))
            hidden = hidden + attended + self._linear(f"{mlp}dense_4h_to_h", wide)
        return self._linear(names["head"], self._norm(names["final_norm"], hidden))

    def _attention(self, prefix: str, cache: Cache, hidden: torch.Tensor) -> torch.Tensor:
        fused = self._linear(f"{prefix}query_key_value", hidden)
        query, key, value = fused.view(self.heads, 3, self.head_dim).unbind(1)
        cache.append((key, value))
        if len(cache) > self.sinks + self.window:
            del cache[self.sinks]
        place = len(cache) - 1
        keys = torch.stack([self._rotate(k, p) for p, (k, _) in enumerate(cache)], dim=1)
        scores = (keys @ self._rotate(query, place)[..., None])[..., 0]
        if self.names is FALCON:
            slopes = 2.0 ** (-8.0 * torch.arange(1, self.heads + 1).double() / self.heads)
            scores = scores + slopes[:, None] * (torch.arange(place + 1) - place)
        weights = (scores * self.head_dim**-0.5).softmax(-1)
        mixed = (weights[:, None] @ torch.stack([v for _, v in cache], dim=1)).flatten()
        return self._linear(f"{prefix}dense", mixed)

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        if self.names is FALCON:
            return x
        rope = self.config.rope_parameters
        dim = int(self.head_dim * rope["partial_rotary_factor"])
        inv_freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        cos, sin = (position * inv_freq.double()).cos(), (position * inv_freq.double()).sin()
        first, second = x[:, :dim].chunk(2, dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin, x[:, dim:])
        return torch.cat(turned, dim=-1)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights.get(f"{name}.weight")
        if weight is None:
            weight = self.weights[f"{self.names['embedding']}.weight"]
        out = weight @ x
        bias = self.weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        eps = getattr(self.config, "layer_norm_eps", None) or self.config.layer_norm_epsilon
        return layer_norm(x, x.shape, weight, bias, eps)

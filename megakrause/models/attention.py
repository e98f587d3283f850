"""Self-attention with either core, and the cache that lets it go on from where it stopped.

Shapes: b batch, s new positions, s_k key positions, e width, h query heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megakrause.config import ModelConfig
from megakrause.models.init import constant, normal
from megakrause.ops.krause import krause_attention
from megakrause.ops.rotary import apply_rotary
from megakrause.ops.softmax import causal_mask, softmax_attention


class KeyValueCache:
    """Keys and values that one layer has seen: the last `limit` of them, or all.

    Keys are kept after rotation, in order of position."""

    def __init__(self, limit: int | None):
        self.limit = limit
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [b, s, h_kv, d]; returns the keys and values that the new positions attend over, [b, s_k, h_kv, d]."""
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k], dim=1), torch.cat([self.v, v], dim=1)
        if self.limit is None or k.shape[1] <= self.limit:
            self.k, self.v = k, v
        else:  # copies, so that what is left out is freed
            self.k, self.v = k[:, -self.limit :].clone(), v[:, -self.limit :].clone()
        return k, v


@dataclass
class Sequence:
    """What all layers need to know of the positions they work on."""

    length: int
    rotary: tuple[Tensor, Tensor] | None  # cos and sin, [s, d]
    doc_start: Tensor | None  # int32 [b, s]; not together with a cache
    _mask: tuple[int, Tensor | None] | None = None

    def mask(self, s_k: int, device: torch.device) -> Tensor | None:
        """The softmax layers' mask, built by the first of them."""
        if self._mask is None or self._mask[0] != s_k:
            self._mask = s_k, causal_mask(self.length, s_k, self.doc_start, device)
        return self._mask[1]


class KrauseCore(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.window is not None
        self.window, self.top_k = config.window, config.top_k
        sigma = torch.tensor(config.sigma)
        self.log_sigma = constant(nn.Parameter(torch.empty(config.heads)), float(sigma.log()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
        return krause_attention(
            q, k, v, self.log_sigma, window=self.window, top_k=self.top_k, doc_start=sequence.doc_start
        )

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache(limit=self.window)


class SoftmaxCore(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
        return softmax_attention(q, k, v, sequence.mask(k.shape[1], q.device))

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache(limit=None)


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) around a core of the layer's kind."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.heads, config.num_kv_heads, config.head_size
        kind = config.attention_of_layers[layer]
        self.core: KrauseCore | SoftmaxCore = KrauseCore(config) if kind == "krause" else SoftmaxCore()
        self.query = linear(config.width, self.heads * self.head_size, config.init_std, bias=config.qkv_bias)
        self.key = linear(config.width, self.kv_heads * self.head_size, config.init_std, bias=config.qkv_bias)
        self.value = linear(config.width, self.kv_heads * self.head_size, config.init_std, bias=config.qkv_bias)
        self.output = linear(self.heads * self.head_size, config.width, config.init_std / (2 * config.layers) ** 0.5)

    def forward(self, x: Tensor, sequence: Sequence, cache: KeyValueCache | None = None) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, self.head_size))  # b s h d
        k = self.key(x).unflatten(-1, (self.kv_heads, self.head_size))
        v = self.value(x).unflatten(-1, (self.kv_heads, self.head_size))
        if sequence.rotary is not None:
            q, k = apply_rotary(q, *sequence.rotary), apply_rotary(k, *sequence.rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.output(self.core(q, k, v, sequence).flatten(-2))  # b s e


def linear(inputs: int, outputs: int, std: float, *, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    normal(layer.weight, std)
    if bias:
        constant(layer.bias, 0.0)
    return layer

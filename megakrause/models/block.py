"""One transformer block: pre-norm attention and a SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import ModelConfig
from megakrause.models.attention import Cache, SelfAttention, Sequence, linear
from megakrause.models.init import constant


class RMSNorm(nn.Module):
    """Root-mean-square normalization (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = constant(nn.Parameter(torch.empty(width)), 1.0)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = linear(config.width, config.mlp_width, config.init_std)
        self.up = linear(config.width, config.mlp_width, config.init_std)
        self.down = linear(config.mlp_width, config.width, config.init_std / (2 * config.layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = SelfAttention(config, layer)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, sequence: Sequence, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), sequence, cache)
        return x + self.mlp(self.mlp_norm(x))

    def new_cache(self) -> Cache:
        return self.attention.core.new_cache()

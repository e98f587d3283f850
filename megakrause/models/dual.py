"""Softmax attention with a Krause branch beside it, for models that were trained without one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import ModelConfig
from megakrause.models.attention import Cache, SelfAttention, Sequence, causal_core
from megakrause.models.init import constant, normal
from megakrause.models.layout import Layout
from megakrause.parallel.linear import TensorParallel

SOFTMAX_SHARE = 0.8  # of the output at the start, wherever the gate's weights are small


@dataclass
class DualCache:
    """The two branches have keys and values of their own."""

    softmax: Cache
    krause: Cache


class DualAttention(SelfAttention):
    """Both branches see the same input and the same rotary positions; a gate mixes their outputs (Krause
    Synchronization Transformers, arXiv 2602.11534, on large language models).

    The softmax branch's parameters have the names that they have in a model without the other branch."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__(config, causal_core(config, "softmax", layout), layout)
        self.krause = SelfAttention(config, causal_core(config, "krause", layout), layout)
        self.gate = Gate(config.width, layout.tp)

    def forward(self, x: Tensor, sequence: Sequence, cache: DualCache | None = None) -> Tensor:  # type: ignore[override]
        x = self.tp.enter(x, sequence.length)
        softmax = self.term(x, sequence, None if cache is None else cache.softmax)
        krause = self.krause.term(x, sequence, None if cache is None else cache.krause)
        return self.gate(self.tp.leave(torch.cat([softmax, krause], dim=-1)))  # the ranks sum both at once

    def new_cache(self, room: int = 0) -> DualCache:  # type: ignore[override]
        return DualCache(super().new_cache(room), self.krause.new_cache())


class Gate(nn.Module):
    """Two shares that are 1 together, for each position, from the outputs of both branches."""

    def __init__(self, width: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = normal(nn.Parameter(torch.empty(2, 2 * width)), 0.01)
        self.bias = constant(nn.Parameter(torch.empty(2)), (math.log(SOFTMAX_SHARE / (1 - SOFTMAX_SHARE)), 0.0))

    def forward(self, outputs: Tensor) -> Tensor:
        """outputs: of softmax and Krause one behind the other, [b, s, 2 e]. Returns [b, s, e]."""
        logits = F.linear(outputs, self.tp.whole(self.weight), self.tp.whole(self.bias))
        share = torch.sigmoid(logits[..., :1] - logits[..., 1:])  # the first of a softmax over two
        softmax, krause = outputs.chunk(2, dim=-1)
        return torch.lerp(krause, softmax, share)


def is_of_branch(name: str) -> bool:
    """Whether a parameter is one that a model without Krause branches lacks."""
    return ".attention.krause." in name or ".attention.gate." in name


def starts_as(name: str) -> str:
    """The parameter of a model without Krause branches that one of a branch starts as: the softmax branch's. (Of
    log_sigma and the gate there is none.)"""
    return name.replace(".attention.krause.", ".attention.", 1)

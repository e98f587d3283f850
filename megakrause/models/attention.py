"""Self-attention around any core, and the caches that let it go on from where it stopped.

Shapes: b batch, s new positions, s_k key positions, e width, h query heads, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import CoreKind, ModelConfig
from megakrause.models.init import constant, normal
from megakrause.models.layout import Layout
from megakrause.models.norm import RMSNorm
from megakrause.ops.feature_dropout import Noise
from megakrause.ops.grid import Grid
from megakrause.ops.krause import krause_attention
from megakrause.ops.krause_decode import KeyRing, krause_decode
from megakrause.ops.rotary import apply_rotary
from megakrause.ops.softmax import causal_mask, softmax_attention
from megakrause.parallel.collectives import copy
from megakrause.parallel.context import heads_for_positions, positions_for_heads, with_halo
from megakrause.parallel.linear import ColumnParallelLinear, PartOfWholeLinear, RowParallelLinear, sharded
from megakrause.parallel.mesh import ALONE, Axis


class GrowingCache:
    """All keys, after rotation, and values that one softmax layer has seen."""

    def __init__(self, room: int = 0) -> None:
        """room: positions that it will have, if that is known."""
        self.length, self._room = 0, room
        self._kv: Tensor | None = None  # 2 b positions h_kv d, with room to grow; a head's positions lie together

    def extend(self, k: Tensor, v: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Adds those of `position` and following, [b, s, h_kv, d]; returns all."""
        self.length = position + k.shape[1]
        b, _, h_kv, d = k.shape
        if self._kv is None or self.length > self._kv.shape[2]:
            size = self._room if self.length <= self._room else 2 * self.length
            room = k.new_empty(2, b, h_kv, size, d).transpose(2, 3)
            if self._kv is not None:
                room[:, :, :position] = self._kv[:, :, :position]
            self._kv = room
        self._kv[0, :, position : self.length], self._kv[1, :, position : self.length] = k, v
        return self._kv[0, :, : self.length], self._kv[1, :, : self.length]


class WindowCache:
    """The last `window` keys, after rotation, and values that one layer has seen."""

    def __init__(self, window: int):
        self.window = window
        self._ring: KeyRing | None = None

    def ring(self, k: Tensor) -> KeyRing:
        """The keys and values so far, or an empty ring for keys such as these."""
        self._ring = self._ring or KeyRing(self.window, k)
        return self._ring

    def extend(self, k: Tensor, v: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Adds those of `position` and following, [b, s, h_kv, d]; returns all that these may see."""
        ring = self.ring(k)
        earlier_k, earlier_v = ring.before(position)
        ring.fill(k, v, position)
        return torch.cat([earlier_k, k], dim=1), torch.cat([earlier_v, v], dim=1)


Cache = GrowingCache | WindowCache


@dataclass
class Sequence:
    """What all layers need to know of the positions they work on: those of this context-parallel rank."""

    start: int  # position of the first
    length: int
    rotary: tuple[Tensor, Tensor] | None  # cos and sin, [s, d]
    all_doc_start: Tensor | None  # int32 [b, positions of all ranks]; not together with a cache
    noise: Noise | None = None  # of the adapters' dropout
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    _all: Sequence | None = None

    def doc_start(self, s_k: int) -> Tensor | None:
        """int32 [b, s]: the first key that each position may see, on an axis of the s_k keys that end with the last."""
        if self.all_doc_start is None:
            return None
        own = self.all_doc_start[:, self.start : self.start + self.length]
        first = self.start + self.length - s_k
        return own if first == 0 else (own - first).clamp(min=0)

    def mask(self, s_k: int, window: int | None, device: torch.device) -> Tensor | None:
        """The mask of the softmax layers with this window, built by the first of them."""
        if (s_k, window) not in self._masks:
            self._masks[s_k, window] = causal_mask(self.length, s_k, self.doc_start(s_k), device, window)
        return self._masks[s_k, window]

    def all(self, length: int) -> Sequence:
        """The positions of all context-parallel ranks, `length` in number."""
        self._all = self._all or (self if length == self.length else Sequence(0, length, None, self.all_doc_start))
        return self._all


class KrauseCore(nn.Module):
    """Over a window."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        assert config.window is not None
        self.window, self.top_k, self.layout = config.window, config.top_k, layout
        self.log_sigma = constant(sharded(layout.tp.axis, (config.heads,), 0), math.log(config.sigma))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence, cache: Cache | None) -> Tensor:
        if cache is not None:
            assert isinstance(cache, WindowCache)
            if sequence.length == 1:
                position = torch.full((len(q),), sequence.start, dtype=torch.int32, device=q.device)
                return krause_decode(q, k, v, self.log_sigma, cache.ring(k), position, top_k=self.top_k)
            k, v = cache.extend(k, v, sequence.start)
        k, v = with_halo(self.layout.cp, self.window - 1, k, v)
        return self.layout.run("selective", self._attend, q, k, v, sequence.doc_start(k.shape[1]))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None) -> Tensor:
        return krause_attention(
            q,
            k,
            v,
            self.log_sigma,
            window=self.window,
            top_k=self.top_k,
            doc_start=doc_start,
            backend=self.layout.backend,
        )

    def new_cache(self, room: int) -> Cache:
        return WindowCache(self.window)


class SoftmaxCore(nn.Module):
    """Full, or over a window."""

    def __init__(self, window: int | None, layout: Layout):
        super().__init__()
        self.window, self.layout = window, layout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence, cache: Cache | None) -> Tensor:
        cp = self.layout.cp
        if cache is not None:
            k, v = cache.extend(k, v, sequence.start)
        if self.window is not None:
            k, v = with_halo(cp, self.window - 1, k, v)
            return self._attend(q, k, v, sequence)
        # Every rank works on all positions of some heads, so that of few key/value heads several may need the same.
        repeats = cp.size // math.gcd(k.shape[2], cp.size)
        k, v = (x.repeat_interleave(repeats, 2) if repeats > 1 else x for x in (k, v))
        q, k, v = (heads_for_positions(x, cp) for x in (q, k, v))
        out = self._attend(q, k, v, sequence.all(q.shape[1]))
        return positions_for_heads(out, cp)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
        s_k = k.shape[1]
        window = self.window if self.window is not None and self.window < s_k else None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = partial(sequence.mask, s_k, window, q.device)
            doc_start, backend = sequence.doc_start(s_k), self.layout.backend
            return softmax_attention(q, k, v, window=self.window, doc_start=doc_start, mask=mask, backend=backend)

        return self.layout.run("selective", attend, q, k, v)

    def new_cache(self, room: int) -> Cache:
        return GrowingCache(room) if self.window is None else WindowCache(self.window)


def causal_core(config: ModelConfig, kind: CoreKind, layout: Layout) -> Core:
    if kind == "krause":
        return KrauseCore(config, layout)
    return SoftmaxCore(config.window if kind == "softmax_window" else None, layout)


class GridKrauseCore(nn.Module):
    """Over the neighbourhood on a grid of patches, which every rank has whole."""

    def __init__(self, config: ModelConfig, layer: int, layout: Layout):
        super().__init__()
        self.grid = Grid(*config.patches, config.radius, config.metric, config.pooling == "cls")
        self.top_k, self.layout, self.shared = config.top_k_of_layers[layer], layout, config.shared_sigma
        axis = ALONE if config.shared_sigma else layout.tp.axis
        log_sigma = sharded(axis, (1 if config.shared_sigma else config.heads,), 0)
        self.log_sigma = constant(log_sigma, math.log(config.sigma))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence, cache: Cache | None) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            log_sigma = copy(self.log_sigma, self.layout.tp.axis) if self.shared else self.log_sigma
            return krause_attention(q, k, v, log_sigma, grid=self.grid, top_k=self.top_k, backend=self.layout.backend)

        return self.layout.run("selective", attend, q, k, v)


class GridSoftmaxCore(nn.Module):
    """Every patch sees every other."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence, cache: Cache | None) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # b h s d
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return self.layout.run("selective", attend, q, k, v)


Core = KrauseCore | SoftmaxCore | GridKrauseCore | GridSoftmaxCore


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) around a core of the layer's kind."""

    def __init__(self, config: ModelConfig, core: Core, layout: Layout):
        """Each rank works on its share of the query heads and the key/value heads that these need."""
        super().__init__()
        width, d, axis = config.width, config.head_size, layout.tp.axis
        self.tp, self.head_size, self.core = layout.tp, d, core
        self.query = marked(ColumnParallelLinear(width, config.heads * d, axis, bias=config.qkv_bias), config.init_std)
        self.key, self.value = (marked(self._key_value(config, axis), config.init_std) for _ in range(2))
        output = RowParallelLinear(config.heads * d, width, axis, bias=config.bias)
        self.output = marked(output, config.deep_init_std)
        self.query_norm, self.key_norm = (
            RMSNorm(d, config.norm_eps, partial(copy, axis=axis)) if config.qk_norm else None for _ in range(2)
        )

    @staticmethod
    def _key_value(config: ModelConfig, axis: Axis) -> ColumnParallelLinear | PartOfWholeLinear:
        d, outputs = config.head_size, config.num_kv_heads * config.head_size
        if config.num_kv_heads >= axis.size:
            return ColumnParallelLinear(config.width, outputs, axis, bias=config.qkv_bias)
        head = axis.rank * config.num_kv_heads // axis.size
        return PartOfWholeLinear(config.width, outputs, axis, range(head * d, (head + 1) * d), bias=config.qkv_bias)

    def forward(self, x: Tensor, sequence: Sequence, cache: Cache | None = None) -> Tensor:
        return self.output.sum(self.term(self.tp.enter(x, sequence.length), sequence, cache), self.tp)

    def term(self, x: Tensor, sequence: Sequence, cache: Cache | None) -> Tensor:
        """This rank's term of the output, without its bias, from what `enter` gave."""
        projected = (f(x, sequence.noise) for f in (self.query, self.key, self.value))
        q, k, v = (y.unflatten(-1, (-1, self.head_size)) for y in projected)  # b s h d
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if sequence.rotary is not None:
            q, k = apply_rotary(q, *sequence.rotary), apply_rotary(k, *sequence.rotary)
        return self.output(self.core(q, k, v, sequence, cache).flatten(-2), sequence.noise)

    def new_cache(self, room: int = 0) -> Cache:
        """Of an attention that looks back only. room: positions that it will have, if that is known."""
        assert isinstance(self.core, KrauseCore | SoftmaxCore)
        return self.core.new_cache(room)


Linear = TypeVar("Linear", bound=ColumnParallelLinear | PartOfWholeLinear | RowParallelLinear)


def marked(layer: Linear, std: float) -> Linear:
    """Marks how a linear layer's parameters are to be initialized."""
    normal(layer.weight, std)
    if layer.bias is not None:
        constant(layer.bias, 0.0)
    return layer

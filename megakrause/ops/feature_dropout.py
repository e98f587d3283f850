"""Dropout of features as a pure function of (seed of the sequence, layer, position, feature): whatever ranks share the
work, whatever is computed again, and wherever a run goes on, the same features are dropped.

The bits are an integer hash (lowbias32 of github.com/skeeto/hash-prospector), once for a position and once more for a
feature: cheap beside the product that follows, and the mask is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOW = 0xFFFFFFFF
POSITION, FEATURE = 0x9E3779B9, 0x85EBCA6B  # odd, so that different numbers stay different
FACTOR1, FACTOR2 = 0x21F0AAAD, 0xD35A2D97
COLUMNS = 1024  # features of a program


@dataclass(frozen=True)
class Noise:
    """What dropout draws from: of the sequences and positions that a forward pass works on."""

    seeds: Tensor  # int64 [b]
    start: int  # the first position

    def drop(self, x: Tensor, layer: int, first: int, dropout: float) -> Tensor:
        """x [b, s, e], features `first` and following of all, with a share `dropout` of them zero and the others
        divided by 1 - dropout. layer: any 32-bit number that others do not have."""
        positions = torch.arange(self.start, self.start + x.shape[1], device=x.device)
        keys = _mix((self._rows(layer)[:, None] + positions * POSITION) & LOW)  # b s
        return _Dropout.apply(x, keys, first, dropout)

    def drop_sequences(self, x: Tensor, layer: int, dropout: float) -> Tensor:
        """x [b, s, e] with a share `dropout` of the sequences zero and the others divided by 1 - dropout."""
        keep = _mix(self._rows(layer)) >= _threshold(dropout)
        return x * (keep / (1 - dropout)).to(x.dtype)[:, None, None]

    def at(self, positions: slice) -> Noise:
        """For some of the positions."""
        return Noise(self.seeds, self.start + positions.start)

    def _rows(self, layer: int) -> Tensor:
        """int64 [b], a number below 2^32 for each sequence."""
        return _mix(_mix((self.seeds ^ layer) & LOW) ^ ((self.seeds >> 32) & LOW))


def kept(keys: Tensor, first: int, features: int, dropout: float) -> Tensor:
    """bool [*, features], True where a feature stays, for keys [*] of positions."""
    numbers = torch.arange(first, first + features, device=keys.device) * FEATURE & LOW
    return _mix(keys[..., None] ^ numbers) >= _threshold(dropout)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, first: int, dropout: float) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.first, ctx.dropout = first, dropout
        return _apply(x, keys, first, dropout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return _apply(grad, keys, ctx.first, ctx.dropout), None, None, None


def _apply(x: Tensor, keys: Tensor, first: int, dropout: float) -> Tensor:
    return by_kernel(x, keys, first, dropout) if x.is_cuda else by_torch(x, keys, first, dropout)


def by_torch(x: Tensor, keys: Tensor, first: int, dropout: float) -> Tensor:
    return x * kept(keys, first, x.shape[-1], dropout) * (1 / (1 - dropout))


def by_kernel(x: Tensor, keys: Tensor, first: int, dropout: float) -> Tensor:
    x, keys = x.contiguous(), keys.contiguous()
    out, features = torch.empty_like(x), x.shape[-1]
    grid = keys.numel(), triton.cdiv(features, COLUMNS)
    _kernel[grid](x, keys, out, features, first, _threshold(dropout), 1 / (1 - dropout), BLOCK=COLUMNS)
    return out


def _threshold(dropout: float) -> int:
    """Bits below it drop."""
    return round(dropout * 2**32)


def _mix(x: Tensor) -> Tensor:
    """Of 32-bit numbers in int64: products may overflow, their low bits do not change."""
    x = (x ^ (x >> 16)) * FACTOR1 & LOW
    x = (x ^ (x >> 15)) * FACTOR2 & LOW
    return x ^ (x >> 15)


@triton.jit
def _kernel(x, keys, out, features, first, threshold, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = feature < features
    bits = tl.load(keys + row).to(tl.uint32) ^ ((feature + first).to(tl.uint32) * 0x85EBCA6B)
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD
    bits = (bits ^ (bits >> 15)) * 0xD35A2D97
    bits = bits ^ (bits >> 15)
    value = tl.load(x + row * features + feature, mask=there)
    # In the order of by_torch, so that the results are equal bit for bit.
    kept = tl.where(bits.to(tl.int64) >= threshold, value, value * 0)
    tl.store(out + row * features + feature, (kept.to(tl.float32) * scale).to(value.dtype), mask=there)

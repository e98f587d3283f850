"""Sequences cut over the context-parallel axis: each rank has an equal, contiguous share of the positions.

A window needs the positions just before a rank's own, its halo: bytes that depend on neither the length of the sequence
nor the number of ranks. Attention to all positions exchanges heads for positions (Jacobs et al., arXiv 2309.14509).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megakrause.parallel.mesh import Axis


def with_halo(axis: Axis, width: int, *xs: Tensor) -> tuple[Tensor, ...]:
    """xs: tensors of one shape with this rank's positions, [b, s, ...]. Returns each as [b, halo + s, ...]: behind the
    `width` positions that come before them, fewer near the start of the sequence. They come from as many ranks to the
    left as they reach; their gradients go back there."""
    return xs if axis.size == 1 or width == 0 else _WithHalo.apply(axis, width, *xs)


def heads_for_positions(x: Tensor, axis: Axis) -> Tensor:
    """[b, s / cp, h, d], all heads of this rank's positions -> [b, s, h / cp, d], its share of the heads of all."""
    return x if axis.size == 1 else _Exchange.apply(x, axis, 2, 1)


def positions_for_heads(x: Tensor, axis: Axis) -> Tensor:
    """[b, s, h / cp, d] -> [b, s / cp, h, d]."""
    return x if axis.size == 1 else _Exchange.apply(x, axis, 1, 2)


def _hops(axis: Axis, length: int, width: int) -> tuple[dict[int, int], dict[int, int]]:
    """How many of its `length` positions each rank to the left gives for this one's halo, nearest first, and how many
    of this one's last positions go to each rank to the right."""
    counts = {hop: min(length, width - (hop - 1) * length) for hop in range(1, -(-width // length) + 1)}
    left = {axis.rank - hop: count for hop, count in counts.items() if hop <= axis.rank}
    return left, {axis.rank + hop: count for hop, count in counts.items() if axis.rank + hop < axis.size}


class _WithHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, width: int, *xs: Tensor) -> tuple[Tensor, ...]:
        b, length, *rest = xs[0].shape
        ctx.axis, ctx.hops = axis, _hops(axis, length, width)
        left, right = ctx.hops
        received = {rank: xs[0].new_empty(len(xs), b, count, *rest) for rank, count in left.items()}
        axis.exchange({rank: torch.stack([x[:, -count:] for x in xs]) for rank, count in right.items()}, received)
        furthest_first = list(received.values())[::-1]
        return tuple(torch.cat([*(part[i] for part in furthest_first), x], 1) for i, x in enumerate(xs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.hops
        halo = sum(left.values())
        own = torch.stack([grad[:, halo:] for grad in grads])  # which tensor; b s ...
        sent, end = {}, halo
        for rank, count in left.items():
            sent[rank] = torch.stack([grad[:, end - count : end] for grad in grads])
            end -= count
        received = {rank: own.new_empty(*own.shape[:2], count, *own.shape[3:]) for rank, count in right.items()}
        ctx.axis.exchange(sent, received)
        for part in received.values():  # nearest first: the same sum every time
            own[:, :, -part.shape[2] :] += part
        return None, None, *own.unbind()


class _Exchange(torch.autograd.Function):
    """Cuts dim `cut` over the ranks and joins dim `joined` from them; its transpose is the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, cut: int, joined: int) -> Tensor:
        ctx.axis, ctx.cut, ctx.joined = axis, cut, joined
        return _exchange(x, axis, cut, joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.axis, ctx.joined, ctx.cut), None, None, None


def _exchange(x: Tensor, axis: Axis, cut: int, joined: int) -> Tensor:
    parts = torch.stack(x.chunk(axis.size, cut))  # which rank's; b s h d
    return torch.cat(axis.all_to_all(parts).unbind(), joined)

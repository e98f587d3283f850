"""Communication that gradients pass through: each function's backward pass is its transpose.

| function       | forward                      | backward       |
|----------------|------------------------------|----------------|
| copy           | nothing                      | sum            |
| reduce         | sum                          | nothing        |
| gather         | all shares, along a dim      | reduce_scatter |
| reduce_scatter | sum, of which each its share | gather         |
| scatter        | each its share               | all shares     |
| collect        | all shares, along a dim      | each its share |

They work on one rank each of an `Axis`, all ranks in the same order. What is the same on every rank before `copy` and
after `reduce`, `gather` and `collect` has the same gradient on every rank; `scatter` opens a sequence-parallel region,
where each rank has its share of the positions (Korthikanti et al., arXiv 2205.05198). Dims are shared as evenly as they
can be (`Axis.share`), so they need not be multiples of the axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megakrause.parallel.mesh import Axis


def copy(x: Tensor, axis: Axis) -> Tensor:
    """x, the same on every rank, each of which goes its own way with it; gradients are summed. Also for a parameter
    that every rank holds whole, of which each uses a part or on which each works with other positions."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of all ranks' x, on every rank."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather(x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
    """All ranks' shares of a dim of size `total`, on every rank, each of which goes its own way with them."""
    return x if axis.size == 1 else _Gather.apply(x, axis, dim, total)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's share along `dim` of the sum of all ranks' x."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim)


def scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's share along `dim` of an x that is the same on every rank; so is its gradient."""
    return x if axis.size == 1 else _Scatter.apply(x, axis, dim)


def collect(x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
    """All ranks' shares of a dim of size `total`, on every rank, all of which do the same with them."""
    return x if axis.size == 1 else _Collect.apply(x, axis, dim, total)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.sum(grad.clone(memory_format=torch.contiguous_format)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return axis.sum(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _all_shares(x, axis, dim, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _share_of_sum(grad, ctx.axis, ctx.dim), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim, ctx.total = axis, dim, x.shape[dim]
        return _share_of_sum(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_shares(grad, ctx.axis, ctx.dim, ctx.total), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim, ctx.total = axis, dim, x.shape[dim]
        share = axis.share(x.shape[dim])
        return x.narrow(dim, share.start, len(share)).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_shares(grad, ctx.axis, ctx.dim, ctx.total), None, None


class _Collect(_Gather):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        share = ctx.axis.share(grad.shape[ctx.dim])
        return grad.narrow(ctx.dim, share.start, len(share)).contiguous(), None, None, None


def _all_shares(x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
    """[..., total, ...] from every rank's share, all on every rank."""
    largest = -(-total // axis.size)
    rows = x.movedim(dim, 0)
    padded = rows.new_zeros(largest, *rows.shape[1:])
    padded[: len(rows)] = rows
    everything = axis.all_gather(padded)
    if total % axis.size:
        parts = everything.split(largest)
        everything = torch.cat([part[: len(axis.share(total, rank))] for rank, part in enumerate(parts)])
    return everything.movedim(0, dim).contiguous()


def _share_of_sum(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's share of the sum of every rank's x, along a dim."""
    rows, total = x.movedim(dim, 0), x.shape[dim]
    if total % axis.size:
        largest = -(-total // axis.size)
        padded = rows.new_zeros(axis.size, largest, *rows.shape[1:])
        for rank in range(axis.size):
            share = axis.share(total, rank)
            padded[rank, : len(share)] = rows[share.start : share.stop]
        rows = padded.flatten(0, 1)
    return axis.reduce_scatter(rows.contiguous())[: len(axis.share(total))].movedim(0, dim).contiguous()

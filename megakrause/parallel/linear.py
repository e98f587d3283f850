"""Linear layers cut over the tensor-parallel axis (Megatron-LM, arXiv 1909.08053): a column-parallel one into a region
where each rank has its share of the features, a row-parallel one out of it.

With `sequence_parallel`, each rank has its share of the positions outside the region (Korthikanti et al., arXiv
2205.05198). A parameter that is cut carries `shard`, its place in the whole one. Parameters are
uninitialized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.parallel.collectives import copy, gather, reduce, reduce_scatter
from megakrause.parallel.mesh import Axis

SEQUENCE_DIM = 1  # of activations, b s e


@dataclass(frozen=True)
class Shard:
    """Which part of a whole parameter this rank holds."""

    dim: int
    start: int
    total: int  # size of the dim in the whole


def sharded(axis: Axis, shape: tuple[int, ...], dim: int) -> nn.Parameter:
    """This rank's share, along `dim`, of a parameter of the given whole shape; it says so as `param.shard`."""
    share = axis.share(shape[dim])
    param = nn.Parameter(torch.empty(*shape[:dim], len(share), *shape[dim + 1 :]))
    if axis.size > 1:
        param.shard = Shard(dim, share.start, shape[dim])  # type: ignore[attr-defined]
    return param


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b, of which each rank computes its share of the output features."""

    def __init__(self, inputs: int, outputs: int, axis: Axis, *, bias: bool = False):
        super().__init__()
        self.weight = sharded(axis, (outputs, inputs), 0)
        self.bias = sharded(axis, (outputs,), 0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, inputs], as `enter` gave it. Returns [b, s, this rank's share of outputs]."""
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T, where each rank has its share of the input features."""

    def __init__(self, inputs: int, outputs: int, axis: Axis):
        super().__init__()
        self.weight = sharded(axis, (outputs, inputs), 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, this rank's share of inputs]. Returns this rank's term of y [b, s, outputs]: see `leave`."""
        return F.linear(x, self.weight)


def enter(x: Tensor, axis: Axis, length: int | None = None) -> Tensor:
    """Into a region where each rank works on its features. x: [b, s, e], the same on every rank; or with `length`, each
    rank's share of so many positions. Column-parallel layers of one input share one call."""
    return copy(x, axis) if length is None else gather(x, axis, SEQUENCE_DIM, length)


def leave(x: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
    """Out of it, from each rank's term of a sum: the sum on every rank, or each rank's share of its positions."""
    return reduce_scatter(x, axis, SEQUENCE_DIM) if sequence_parallel else reduce(x, axis)

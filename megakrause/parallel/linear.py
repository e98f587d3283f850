"""Linear layers cut over the tensor-parallel axis (Megatron-LM, arXiv 1909.08053): a column-parallel one into a region
where each rank has its share of the features, a row-parallel one out of it.

With sequence parallelism, each rank has its share of the positions outside the region (Korthikanti et al., arXiv
2205.05198). A parameter that is cut carries `shard`, its place in the whole one. Parameters are uninitialized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.ops.feature_dropout import Noise
from megakrause.parallel.collectives import copy, gather, reduce, reduce_scatter
from megakrause.parallel.mesh import ALONE, Axis

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


class AdaptableLinear(nn.Module):
    """What all have in common: a weight, and perhaps a module that adds to the output what it makes of the input and
    the noise for its dropout (None: no dropout)."""

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.adapter: nn.Module | None = None

    def _adapted(self, x: Tensor, y: Tensor, noise: Noise | None) -> Tensor:
        return y if self.adapter is None else y + self.adapter(x, noise)


class ColumnParallelLinear(AdaptableLinear):
    """y = x W^T + b, of which each rank computes its share of the output features."""

    def __init__(self, inputs: int, outputs: int, axis: Axis, *, bias: bool = False):
        super().__init__()
        self.weight = sharded(axis, (outputs, inputs), 0)
        self.bias = sharded(axis, (outputs,), 0) if bias else None

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """x: [b, s, inputs], as `TensorParallel.enter` gave it. Returns this rank's share, [b, s, outputs / tp]."""
        return self._adapted(x, F.linear(x, self.weight, self.bias), noise)


class RowParallelLinear(AdaptableLinear):
    """y = x W^T + b, where each rank has its share of the input features."""

    def __init__(self, inputs: int, outputs: int, axis: Axis, *, bias: bool = False):
        super().__init__()
        self.weight = sharded(axis, (outputs, inputs), 1)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """x: this rank's share, [b, s, inputs / tp]. Returns its term of y - b, [b, s, outputs]: see `sum`."""
        return self._adapted(x, F.linear(x, self.weight), noise)

    def sum(self, term: Tensor, tp: TensorParallel) -> Tensor:
        """y, or its share of the positions, from the ranks' terms."""
        y = tp.leave(term)
        return y if self.bias is None else y + tp.whole(self.bias)


class PartOfWholeLinear(AdaptableLinear):
    """y = x W^T + b, of which each rank computes the given output features, while it holds the whole of W and b: for
    features that several ranks need, such as the key/value heads when there are fewer than ranks."""

    def __init__(self, inputs: int, outputs: int, axis: Axis, features: range, *, bias: bool = False):
        super().__init__()
        self.axis, self.features = axis, features
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """x: [b, s, inputs], as `TensorParallel.enter` gave it. Returns [b, s, features]."""
        part = slice(self.features.start, self.features.stop)
        bias = None if self.bias is None else copy(self.bias, self.axis)[part]
        return self._adapted(x, F.linear(x, copy(self.weight, self.axis)[part], bias), noise)


@dataclass(frozen=True)
class TensorParallel:
    """How a model is cut over the ranks of an axis.

    sequence_parallel: outside the regions that `enter` opens and `leave` closes, each rank works on its share of the
    positions; else every rank on all of them, doing the same."""

    axis: Axis = ALONE
    sequence_parallel: bool = False

    def enter(self, x: Tensor, length: int) -> Tensor:
        """Into a region where each rank works on its features. x: [b, s, e], or its share of `length` positions; [b,
        length, e] comes back. Column-parallel layers of one input share one call."""
        return gather(x, self.axis, SEQUENCE_DIM, length) if self.sequence_parallel else copy(x, self.axis)

    def leave(self, x: Tensor) -> Tensor:
        """Out of it. x: [b, length, e], each rank's term of a sum. The sum comes back, or its share of positions."""
        return reduce_scatter(x, self.axis, SEQUENCE_DIM) if self.sequence_parallel else reduce(x, self.axis)

    def whole(self, param: Tensor) -> Tensor:
        """A parameter that every rank holds whole and uses outside the regions."""
        return copy(param, self.axis) if self.sequence_parallel else param

    def positions(self, length: int) -> slice:
        """Of `length` positions, those that this rank works on outside the regions."""
        share = self.axis.share(length) if self.sequence_parallel else range(length)
        return slice(share.start, share.stop)

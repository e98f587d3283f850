"""Root-mean-square normalization (Zhang & Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.models.init import constant
from megakrause.parallel.collectives import copy
from megakrause.parallel.linear import TensorParallel
from megakrause.parallel.mesh import Axis


class RMSNorm(nn.Module):
    """Of the residual stream, outside the regions of tensor parallelism."""

    def __init__(self, width: int, eps: float, tp: TensorParallel):
        super().__init__()
        self.weight = constant(nn.Parameter(torch.empty(width)), 1.0)
        self.eps, self.tp = eps, tp

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.tp.whole(self.weight), self.eps)


class HeadNorm(nn.Module):
    """Of each head by itself, with one weight for all, inside a region where each rank has some of the heads."""

    def __init__(self, head_size: int, eps: float, axis: Axis):
        super().__init__()
        self.weight = constant(nn.Parameter(torch.empty(head_size)), 1.0)
        self.eps, self.axis = eps, axis

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, heads of this rank, head_size]."""
        return F.rms_norm(x, self.weight.shape, copy(self.weight, self.axis), self.eps)

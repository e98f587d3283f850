"""Root-mean-square normalization (Zhang & Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.models.init import constant


class RMSNorm(nn.Module):
    """Over the last dim, with a weight that every rank holds whole."""

    def __init__(self, width: int, eps: float, whole: Callable[[Tensor], Tensor]):
        """whole: sums the weight's gradient over the ranks that work on different parts of what is normalized."""
        super().__init__()
        self.weight = constant(nn.Parameter(torch.empty(width)), 1.0)
        self.eps, self._whole = eps, whole

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self._whole(self.weight), self.eps)

"""Normalization over the last dim, with parameters that every rank holds whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import ModelConfig
from megakrause.models.init import constant


class RMSNorm(nn.Module):
    """Root-mean-square normalization (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float, whole: Callable[[Tensor], Tensor]):
        """whole: sums the weight's gradient over the ranks that work on different parts of what is normalized."""
        super().__init__()
        self.weight = constant(nn.Parameter(torch.empty(width)), 1.0)
        self.eps, self._whole = eps, whole

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self._whole(self.weight), self.eps)


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al., arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float, whole: Callable[[Tensor], Tensor]):
        """whole: as of `RMSNorm`."""
        super().__init__()
        self.weight = constant(nn.Parameter(torch.empty(width)), 1.0)
        self.bias = constant(nn.Parameter(torch.empty(width)), 0.0)
        self.eps, self._whole = eps, whole

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self._whole(self.weight), self._whole(self.bias), self.eps)


def build_norm(config: ModelConfig, whole: Callable[[Tensor], Tensor]) -> RMSNorm | LayerNorm:
    """The one that a model has between its layers."""
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.width, config.norm_eps, whole)

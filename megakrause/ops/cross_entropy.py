"""Cross entropy summed over tokens, so that the mean over any batch, micro-batch or rank is one division."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cross_entropy_sum(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of -log p(target) in float32 over the tokens where the mask is True.

    logits: [b, s, v]; targets: int64 [b, s]; mask: bool [b, s]."""
    if mask is not None:
        targets = targets.masked_fill(~mask, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")

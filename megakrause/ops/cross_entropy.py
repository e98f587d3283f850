"""Cross entropy summed over tokens, so that the mean over any batch, micro-batch or rank is one division."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ELEMENTS_AT_ONCE = {"cpu": 2**18, "cuda": 2**27}  # of the logits: what stays in a cache; what is little memory


def cross_entropy_sum(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum of -log p(target) over the tokens where the mask is True; in float32, or float64 for float64 logits.

    logits: [b, s, v], **used up**: where a gradient is wanted it is computed at once, in their memory, so that the
    largest tensors of a step exist once and not four times. targets: int64 [b, s]; mask: bool [b, s]."""
    return _CrossEntropySum.apply(logits, targets, mask)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rows = logits.detach().flatten(0, 1)  # n v
        targets, mask = targets.flatten()[:, None], mask.flatten()[:, None]
        if not rows.is_contiguous() or rows.data_ptr() != logits.data_ptr():
            raise ValueError(f"logits of strides {logits.stride()} are not contiguous")
        total = torch.zeros((), dtype=compute, device=logits.device)
        step = max(1, ELEMENTS_AT_ONCE.get(logits.device.type, 2**18) // rows.shape[1])
        for part, target, kept in zip(rows.split(step), targets.split(step), mask.split(step), strict=True):
            x = part.to(compute)
            p = torch.softmax(x, dim=-1)
            # The largest p is never small, so that the log of the sum is exact even where p(target) underflows.
            log_sum = x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
            total += ((log_sum - x.gather(1, target)) * kept).sum()
            if ctx.needs_input_grad[0]:
                p.scatter_add_(1, target, torch.full_like(log_sum, -1))
                p *= kept
                part.copy_(p)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(rows.view(logits.shape))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        for part in gradient.view(-1).split(ELEMENTS_AT_ONCE.get(gradient.device.type, 2**18)):
            part.copy_(part.to(grad.dtype) * grad)  # in its precision: a scale rounded to bfloat16 is 0.4 % off
        return gradient, None, None

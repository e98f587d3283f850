"""Embedding and cross entropy with the vocabulary cut over the tensor-parallel axis. No rank ever holds all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megakrause.ops.cross_entropy import ELEMENTS_AT_ONCE
from megakrause.parallel.linear import sharded
from megakrause.parallel.mesh import Axis


class VocabParallelEmbedding(nn.Module):
    """Each rank holds its share of the rows and gives zeros for the tokens of the others."""

    def __init__(self, vocab_size: int, width: int, axis: Axis):
        super().__init__()
        self.vocab_size, self.rows = vocab_size, axis.share(vocab_size)
        self.weight = sharded(axis, (vocab_size, width), 0)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [b, s]. Returns this rank's term [b, s, width] of a sum: see `TensorParallel.leave`."""
        if len(self.rows) == self.vocab_size:
            return nn.functional.embedding(tokens, self.weight)
        mine = (tokens >= self.rows.start) & (tokens < self.rows.stop)
        x = nn.functional.embedding((tokens - self.rows.start) * mine, self.weight)
        return x * mine[..., None]


def vocab_parallel_cross_entropy_sum(
    logits: Tensor, targets: Tensor, mask: Tensor, axis: Axis, vocab_size: int
) -> Tensor:
    """As `ops.cross_entropy.cross_entropy_sum`, the same number on every rank. logits: [b, s, this rank's share of the
    vocabulary], **used up**; targets and mask: of the whole vocabulary, the same on every rank."""
    return _VocabParallelCrossEntropySum.apply(logits, targets, mask, axis, vocab_size)


class _VocabParallelCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, mask: Tensor, axis: Axis, vocab_size: int) -> Tensor:
        compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if not logits.is_contiguous():
            raise ValueError(f"logits of strides {logits.stride()} are not contiguous")
        rows = logits.detach().view(-1, logits.shape[-1])  # n v/tp
        vocabulary = axis.share(vocab_size)
        target, kept = targets.flatten() - vocabulary.start, mask.flatten()
        mine = (target >= 0) & (target < len(vocabulary))
        target = torch.where(mine, target, 0)

        # Per row: the largest logit of all ranks, then the sum of exp(logit - largest) and the target's logit.
        step = max(1, ELEMENTS_AT_ONCE.get(logits.device.type, 2**18) // max(1, rows.shape[1]))
        highest = torch.cat([part.amax(-1).to(compute) for part in rows.split(step)])
        axis.max(highest)
        parts = zip(rows.split(step), highest.split(step), strict=True)
        sums = [(part.to(compute) - high[:, None]).exp().sum(-1) for part, high in parts]
        totals = torch.stack([torch.cat(sums), rows.gather(1, target[:, None])[:, 0].to(compute) * mine])
        axis.sum(totals)
        log_sum = highest + totals[0].log()

        if ctx.needs_input_grad[0]:
            columns = (x.split(step) for x in (rows, log_sum, target, mine, kept))
            for part, total, index, here, keep in zip(*columns, strict=True):
                p = (part.to(compute) - total[:, None]).exp()
                p.scatter_add_(1, index[:, None], -here[:, None].to(compute))
                part.copy_(p * keep[:, None])
            ctx.save_for_backward(logits.detach())
        return ((log_sum - totals[1]) * kept).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        for part in gradient.view(-1).split(ELEMENTS_AT_ONCE.get(gradient.device.type, 2**18)):
            part.copy_(part.to(grad.dtype) * grad)  # in its precision: a scale rounded to bfloat16 is 0.4 % off
        return gradient, None, None, None, None

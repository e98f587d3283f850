"""What models are trained to do, as sums over what a batch has to learn: the mean over any batch, micro-batch or rank
is one division."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megakrause.config import ModelConfig
from megakrause.ops.cross_entropy import cross_entropy_sum
from megakrause.parallel.mesh import ALONE, Axis
from megakrause.parallel.vocab import vocab_parallel_cross_entropy_sum


@dataclass(frozen=True)
class Objective:
    """sums: of a model's output, the targets and the loss_mask of a batch; [n], of which the first is in nats, what is
    minimized, and each has a name."""

    names: tuple[str, ...]
    sums: Callable[[Tensor, Tensor, Tensor], Tensor]


def build_objective(config: ModelConfig, tp: Axis = ALONE) -> Objective:
    """Of a model whose output is cut over an axis of tensor-parallel ranks. The logits are used up."""
    if config.classes is not None:
        return Objective(("loss", "top1", "top5"), class_sums)
    assert config.vocab_size is not None
    vocab_size = config.vocab_size

    def token_sums(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        if tp.size > 1:
            return vocab_parallel_cross_entropy_sum(logits, targets, mask, tp, vocab_size).view(1)
        return cross_entropy_sum(logits, targets, mask).view(1)

    return Objective(("loss",), token_sums)


def class_sums(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """float32 or higher [3]: nats of soft targets, images whose likeliest class is right, and those of which one of the
    five likeliest is. logits, targets: [b, classes]; mask: bool [b]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nats = -(targets * F.log_softmax(logits, dim=-1)).sum(-1)
    likeliest = logits.detach().topk(min(5, logits.shape[1]), dim=-1).indices == targets.argmax(-1, keepdim=True)
    return torch.stack([(x * mask).sum() for x in (nats, likeliest[:, 0], likeliest.any(-1))])

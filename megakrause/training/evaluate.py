"""Held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from megakrause.batch import TokenBatch
from megakrause.parallel.mesh import Mesh


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats per token
    tokens: int
    bits_per_byte: float | None  # None where the corpus does not say how many bytes its tokens stand for

    def __str__(self) -> str:
        text = f"{self.loss:.4f} nats per token over {self.tokens:,} tokens"
        return text if self.bits_per_byte is None else f"{text}, {self.bits_per_byte:.4f} bits per byte"

    def to_row(self) -> dict[str, float]:
        row = {"eval_loss": self.loss, "eval_tokens": self.tokens}
        return row if self.bits_per_byte is None else row | {"eval_bits_per_byte": self.bits_per_byte}


def evaluate(
    loss_sum: Callable[[TokenBatch], tuple[float, int]],
    batches: Iterable[TokenBatch],
    mesh: Mesh,
    bytes_per_token: float | None,
    total: int | None = None,
) -> Evaluation:
    """The mean loss over all ranks' batches. loss_sum: (sum of nats, tokens) of one batch. total: batches to come,
    for the progress bar."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in tqdm(batches, "evaluating", total, unit="batch", leave=False, disable=None if mesh.is_main else True):
        sums += torch.tensor(loss_sum(batch), dtype=torch.float64)
    nats, tokens = mesh.data.sum(sums.to(mesh.device)).tolist()
    loss = nats / max(tokens, 1)
    return Evaluation(loss, int(tokens), None if bytes_per_token is None else loss / math.log(2) / bytes_per_token)

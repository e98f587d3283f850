"""Means over what was held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from tqdm import tqdm

from megakrause.batch import Batch
from megakrause.config import ModelConfig
from megakrause.parallel.mesh import Mesh

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats per token, pixel value or image
    count: int  # of these
    unit: str  # in the singular
    bits_per_byte: float | None = None  # None where the corpus does not say how many bytes its tokens stand for
    bits_per_dim: float | None = None  # of the pixel values of images
    top1: float | None = None  # shares of images whose class was found, or is among the five likeliest
    top5: float | None = None

    def __str__(self) -> str:
        text = f"{self.loss:.4f} nats per {self.unit} over {self.count:,} {self.unit}s"
        if self.bits_per_byte is not None:
            text += f", {self.bits_per_byte:.4f} bits per byte"
        if self.bits_per_dim is not None:
            text += f", {self.bits_per_dim:.4f} bits per dimension"
        if self.top1 is not None:
            text += f", top-1 {self.top1:.2%}, top-5 {self.top5:.2%}"
        return text

    def to_row(self) -> dict[str, float]:
        row: dict[str, float] = {"eval_loss": self.loss, f"eval_{self.unit}s": self.count}
        others = {name: getattr(self, name) for name in ("bits_per_byte", "bits_per_dim", "top1", "top5")}
        return row | {f"eval_{name}": value for name, value in others.items() if value is not None}


def evaluate(
    sums: Callable[[B], tuple[Sequence[float], int]],
    batches: Iterable[B],
    mesh: Mesh,
    model: ModelConfig,
    bytes_per_token: float | None = None,
    total: int | None = None,
) -> Evaluation:
    """The means over all ranks' batches. sums: (what the objective sums up, of how many) of one batch. total: batches
    to come, for the progress bar."""
    added = torch.zeros(4, dtype=torch.float64)
    for batch in tqdm(batches, "evaluating", total, unit="batch", leave=False, disable=None if mesh.is_main else True):
        values, count = sums(batch)
        added[: 1 + len(values)] += torch.tensor([count, *values], dtype=torch.float64)
    count, loss, top1, top5 = mesh.data.sum(added.to(mesh.device)).tolist()
    n = max(count, 1)
    loss, bits = loss / n, loss / n / math.log(2)
    match model.kind:
        case "vit" | "swin":
            return Evaluation(loss, int(count), model.unit, top1=top1 / n, top5=top5 / n)
        case "image":
            return Evaluation(loss, int(count), model.unit, bits_per_dim=bits)
    return Evaluation(
        loss, int(count), model.unit, bits_per_byte=None if bytes_per_token is None else bits / bytes_per_token
    )

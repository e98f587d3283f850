"""The unit in which training state leaves and enters a running engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Box:
    """What a rank holds of a parameter of shape `shape`: the part of shape `size` from the corner `start` on, cut along
    one dim at most."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        return Box(shape, (0,) * len(shape), shape)

    def holds(self, offset: int, numel: int) -> bool:
        """Whether it is a part of a parameter, and has elements [offset, offset + numel) when it is flattened."""
        inside = all(s + n <= whole for s, n, whole in zip(self.start, self.size, self.shape, strict=True))
        return inside and offset + numel <= math.prod(self.size)

    @property
    def dim(self) -> int | None:
        """Along which it is cut; None: it is the whole."""
        cut = [dim for dim, (part, whole) in enumerate(zip(self.size, self.shape, strict=True)) if part != whole]
        return cut[0] if cut else None


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one parameter's weights or Adam moments, as one data-parallel rank hands it out.

    A parameter of shape `shape` is cut by tensor parallelism into boxes, one for each model-parallel rank; a box,
    flattened in row-major order, is cut by data parallelism into fragments. Over all ranks of both kinds, the
    fragments of one (name, kind) hold each element of the parameter exactly once.
    """

    name: str  # as in model.named_parameters()
    kind: str  # "master" (fp32 weights), "exp_avg" or "exp_avg_sq" (Adam's moments)
    shape: tuple[int, ...]  # of the whole parameter, over all ranks
    start: tuple[int, ...]  # corner of this model-parallel rank's box in it; all zeros without tensor parallelism
    box: tuple[int, ...]  # shape of that box; equal to `shape` without tensor parallelism
    offset: int  # of the first element here, in the flattened box
    tensor: torch.Tensor  # 1-D, contiguous, fp32

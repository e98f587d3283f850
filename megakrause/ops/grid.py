"""The two-dimensional neighbourhood of image patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Patches in raster order, after a CLS token at position 0 if `cls`.

    A patch sees the patches within `radius` (itself included) and CLS; CLS sees and is seen by all."""

    height: int
    width: int
    radius: int = 1
    metric: Literal["manhattan", "chebyshev"] = "manhattan"
    cls: bool = True

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"Grid of {self.height} x {self.width} patches; both must be at least 1")
        if self.radius < 0:
            raise ValueError(f"Grid radius = {self.radius}; it must be at least 0")
        if self.metric not in ("manhattan", "chebyshev"):
            raise ValueError(f"Grid metric = {self.metric!r}; use 'manhattan' or 'chebyshev'")

    @property
    def tokens(self) -> int:
        return self.height * self.width + self.cls

    def mask(self, device: torch.device | None = None) -> Tensor:
        """bool [tokens, tokens]: which key (column) each query (row) sees."""
        row = torch.arange(self.height, device=device).repeat_interleave(self.width)
        column = torch.arange(self.width, device=device).repeat(self.height)
        down = (row[:, None] - row[None, :]).abs()
        across = (column[:, None] - column[None, :]).abs()
        distance = down + across if self.metric == "manhattan" else torch.maximum(down, across)
        seen = distance <= self.radius
        return torch.nn.functional.pad(seen, (1, 0, 1, 0), value=True) if self.cls else seen

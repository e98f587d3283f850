"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated against each other as in Llama."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """How a model reads longer texts than it was trained on at first."""

    @property
    def kind(self) -> str:
        """What is divided by `factor`. linear: all frequencies. llama3 (Llama 3.1): those whose waves are longer than
        original_positions / low_freq_factor; none shorter than original_positions / high_freq_factor; between, part."""

    @property
    def factor(self) -> float: ...

    @property
    def low_freq_factor(self) -> float: ...

    @property
    def high_freq_factor(self) -> float: ...

    @property
    def original_positions(self) -> int: ...


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: Scaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [..., head_dim], of integer positions [...]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _scaled(frequencies: Tensor, scaling: Scaling) -> Tensor:
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    waves = frequencies * (scaling.original_positions / (2 * math.pi))  # in the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return torch.lerp(slow, frequencies, ((waves - low) / (high - low)).clamp(0, 1))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [b, s, h, d] by angles [s, d] (or [b, s, d]); keeps x's dtype."""
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin

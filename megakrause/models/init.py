"""Initial weights as a pure function of (seed, parameter name): the same for every layout, because whole
tensors are drawn and then cut."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
from torch import Tensor, nn

from megakrause.parallel.linear import Shard

P = TypeVar("P", bound=Tensor)


def normal(param: P, std: float) -> P:
    """Marks a parameter to be drawn from N(0, std^2)."""
    param.initial_std = std  # type: ignore[attr-defined]
    return param


def constant(param: P, value: float | tuple[float, ...]) -> P:
    """Marks a parameter to be filled with one value, or with these."""
    param.initial_value = torch.tensor(value)  # type: ignore[attr-defined]
    return param


def whole_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model, or of a rank's part of it, by their names in the whole model. (A tied weight that two
    pipeline stages hold has one name.)"""
    return {getattr(param, "copy_of", name): param for name, param in model.named_parameters()}


def whole_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter of which this rank holds a part."""
    shape, shard = list(getattr(param, "ds_shape", param.shape)), getattr(param, "shard", None)
    if shard is not None:
        shape[shard.dim] = shard.total
    return tuple(shape)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fills every parameter as its layer marked it. Raises AttributeError for one that no layer marked."""
    for name, param in whole_names(model).items():
        value = getattr(param, "initial_value", None)
        if value is not None:
            param.copy_(value)
            continue
        shard: Shard | None = getattr(param, "shard", None)
        drawn = _draw(seed, name, torch.Size(whole_shape(param)))
        if shard is not None:
            drawn = drawn.narrow(shard.dim, shard.start, param.shape[shard.dim])
        param.copy_(drawn * param.initial_std)  # type: ignore[attr-defined]


def _draw(seed: int, name: str, shape: torch.Size) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)

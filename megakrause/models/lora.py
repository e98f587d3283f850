"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): beside a frozen W, y = x W^T + scale x A^T B^T."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import LoraConfig
from megakrause.models.attention import KrauseCore
from megakrause.models.dual import Gate
from megakrause.models.init import constant, normal, whole_shape
from megakrause.ops.feature_dropout import Noise
from megakrause.parallel.collectives import copy
from megakrause.parallel.linear import AdaptableLinear, PartOfWholeLinear
from megakrause.parallel.mesh import Axis


class Adapter(nn.Module):
    """A [rank, inputs] and B [outputs, rank] of one linear layer. Where its weight is cut, A or B is cut as well; the
    other is whole on every rank."""

    def __init__(self, layer: AdaptableLinear, config: LoraConfig, axis: Axis):
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.axis, self.scale, self.dropout = axis, config.scale, config.dropout
        self.layer, self.first = 0, 0  # what dropout tells layers by; of its inputs, the first that is here
        self.features = layer.features if isinstance(layer, PartOfWholeLinear) else None
        self.a = nn.Parameter(torch.empty(config.rank, inputs))
        self.b = nn.Parameter(torch.empty(outputs, config.rank))
        if (shard := getattr(layer.weight, "shard", None)) is not None:
            (self.b, self.a)[shard.dim].shard = shard  # type: ignore[attr-defined]
            self.first = shard.start if shard.dim == 1 else 0
        normal(self.a, (3 * whole_shape(layer.weight)[1]) ** -0.5)  # as wide as PEFT's uniform distribution
        constant(self.b, 0.0)

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        """What the layer's own output lacks, from the layer's input. noise: None for no dropout."""
        if noise is not None and self.dropout > 0:
            x = noise.drop(x, self.layer, self.first, self.dropout)
        a, b = (p if hasattr(p, "shard") else copy(p, self.axis) for p in (self.a, self.b))
        if self.features is not None:
            b = b[self.features.start : self.features.stop]
        return F.linear(F.linear(x, a) * self.scale, b)


def add_adapters(module: nn.Module, config: LoraConfig, axis: Axis) -> None:
    """Gives the linear layers that the config names an adapter."""
    endings = tuple(f".{target}" for target in config.targets)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, AdaptableLinear) and f".{name}".endswith(endings):
            layer.adapter = Adapter(layer, config, axis)


def prepare(model: nn.Module) -> None:
    """Numbers the adapters of a model, or of a rank's part of it, by their names, and freezes what is not trained."""
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            module.layer = zlib.crc32(name.encode())
    freeze(model)


def freeze(module: nn.Module) -> None:
    """Leaves to be trained: adapters, the widths of Krause kernels and the gates of dual layers."""
    module.requires_grad_(False)
    for part in module.modules():
        if isinstance(part, Adapter | KrauseCore | Gate):
            part.requires_grad_(True)


def adapter_names(name: str) -> tuple[str, str]:
    """The names of A and B of the linear layer with a weight of this name."""
    layer = name.removesuffix(".weight")
    return f"{layer}.adapter.a", f"{layer}.adapter.b"


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The weight of a linear layer that computes what this one does with its adapter."""
    return weight.addmm(b, a, alpha=scale)


def is_of_adapter(name: str) -> bool:
    return ".adapter." in name

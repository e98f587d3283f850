"""From a config to a model, and what a config says of its size and cost."""

from __future__ import annotations

import torch
from torch import nn

from megakrause.config import ModelConfig
from megakrause.models.init import initialize, whole_shape
from megakrause.models.layout import Layout
from megakrause.models.lm import LanguageModel
from megakrause.models.swin import SwinTransformer
from megakrause.models.vit import VisionTransformer

Model = LanguageModel | VisionTransformer | SwinTransformer


def build_model(config: ModelConfig, seed: int | None = None, layout: Layout | None = None) -> Model:
    """The model of a config whose vocab_size is known, or this rank's part of it, with the initial weights of `seed`,
    or uninitialized."""
    kinds: dict[str, type[Model]] = {"vit": VisionTransformer, "swin": SwinTransformer}
    model = kinds.get(config.kind, LanguageModel)(config, layout)
    if seed is not None:
        initialize(model, seed)
    return model


def build_language_model(config: ModelConfig, seed: int | None = None) -> LanguageModel:
    """The same, of a config of one."""
    model = build_model(config, seed)
    assert isinstance(model, LanguageModel)
    return model


def whole_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the whole model, by name."""
    with torch.device("meta"):
        return {name: whole_shape(param) for name, param in build_model(config).named_parameters()}


def trained_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of those of `whole_shapes` that are not frozen."""
    with torch.device("meta"):
        named = build_model(config).named_parameters()
    return {name: whole_shape(param) for name, param in named if param.requires_grad}


def count_parameters(model: nn.Module, *, trained: bool = False) -> int:
    """trained: of those that are not frozen alone."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)

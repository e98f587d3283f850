"""From a config to a model, and what a config says of its size and cost."""

from __future__ import annotations

import torch
from torch import nn

from megakrause.config import ModelConfig
from megakrause.models.init import initialize, whole_shape
from megakrause.models.layout import Layout
from megakrause.models.lm import LanguageModel


def build_model(config: ModelConfig, seed: int | None = None, layout: Layout | None = None) -> LanguageModel:
    """The model of a config whose vocab_size is known, or this rank's part of it, with the initial weights of `seed`,
    or uninitialized."""
    model = LanguageModel(config, layout)
    if seed is not None:
        initialize(model, seed)
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


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations that training needs for one token."""
    return sum(flops_of_layers(config, seq_len))


def flops_of_layers(config: ModelConfig, seq_len: int) -> list[float]:
    """Of each block and of the head, for one token: forward and twice as many backward, products only. Frozen weights
    have no gradients, and so one product less; what adapters add is not counted.

    A query meets at most its layer's `window` keys, or (seq_len + 1) / 2 on average; document masks are not taken into
    account."""
    assert config.vocab_size is not None
    q, kv, width = config.heads * config.head_size, config.num_kv_heads * config.head_size, config.width

    passes = 3 if config.lora is None else 2

    def attention(limit: int | None) -> float:
        window = min(limit or seq_len, seq_len)
        scores = 2 * q * (window - window * (window - 1) / (2 * seq_len))
        return 2 * passes * width * (2 * q + 2 * kv) + 2 * 3 * scores

    def block(layer: int) -> float:
        flops = 2 * passes * 3 * width * config.mlp_width + attention(config.window_of_layers[layer])
        if config.attention_of_layers[layer] == "dual":
            flops += attention(config.window) + 2 * 3 * 2 * 2 * width
        return flops

    return [block(layer) for layer in range(config.layers)] + [2 * passes * width * config.vocab_size]

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


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations that training needs for one token."""
    return sum(flops_of_layers(config, seq_len))


def flops_of_layers(config: ModelConfig, seq_len: int) -> list[float]:
    """Of each block and of the head, for one token: forward and twice as many backward, products only.

    A query meets at most its layer's `window` keys, or (seq_len + 1) / 2 on average; document masks are not taken into
    account."""
    assert config.vocab_size is not None
    q, kv, width = config.heads * config.head_size, config.num_kv_heads * config.head_size, config.width

    def attention(limit: int | None) -> float:
        window = min(limit or seq_len, seq_len)
        return width * (2 * q + 2 * kv) + 2 * q * (window - window * (window - 1) / (2 * seq_len))

    def block(layer: int) -> float:
        products = 3 * width * config.mlp_width + attention(config.window_of_layers[layer])
        if config.attention_of_layers[layer] == "dual":
            products += attention(config.window) + 2 * 2 * width
        return products

    return [3 * 2 * block(layer) for layer in range(config.layers)] + [3 * 2 * width * config.vocab_size]

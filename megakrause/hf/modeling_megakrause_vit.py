"""Vision transformers with Krause attention for transformers. This file ships with every export and stands alone.

For patch i of one head, with sigma = exp(log_sigma), attention goes to the nearest of the patches N(i) within `radius`
on the grid, i itself included, and to the class token, which sees and is seen by all (Krause Synchronization
Transformers, arXiv 2602.11534):

    z_ij = q_i . k_j - ||k_j||^2 / 2             -||q_i - k_j||^2 / 2 up to a constant of the row; in float32 at least
    keep(i) = the keys of N(i) whose z is among the top_k largest of the row, ties with the last one included; None: all
    out_i = sum_j p_ij v_j,   p_i = softmax of z_i / sigma^2 over keep(i)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple


class MegakrauseViTConfig(PretrainedConfig):
    """attention: "krause" or "softmax" for each layer. krause_top_k: of each layer; None: all. metric: of distances on
    the grid, "manhattan" or "chebyshev". pooling: "cls" (a token of its own) or "mean". post_norm: norms follow the
    sums. shared_sigma: one kernel width a layer, not one a head."""

    model_type = "megakrause_vit"

    def __init__(
        self,
        image_size: Sequence[int] = (224, 224),
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 384,
        intermediate_size: int = 1536,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        head_dim: int | None = None,
        attention: Sequence[str] | None = None,
        krause_top_k: Sequence[int | None] | None = None,
        krause_sigma: float = 4.5,
        radius: int = 2,
        metric: str = "chebyshev",
        shared_sigma: bool = True,
        pooling: str = "cls",
        norm: str = "layer",
        post_norm: bool = False,
        mlp: str = "gelu",
        bias: bool = True,
        qkv_bias: bool = True,
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        self.image_size = list(image_size)
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.attention = list(attention or ["krause"] * num_hidden_layers)
        self.krause_top_k = list(krause_top_k or [None] * num_hidden_layers)
        self.krause_sigma = krause_sigma
        self.radius = radius
        self.metric = metric
        self.shared_sigma = shared_sigma
        self.pooling = pooling
        self.norm = norm
        self.post_norm = post_norm
        self.mlp = mlp
        self.bias = bias
        self.qkv_bias = qkv_bias
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


def neighbourhood(config: MegakrauseViTConfig) -> Tensor:
    """bool [s, s]: which key (column) each query (row) sees."""
    height, width = (side // config.patch_size for side in config.image_size)
    row = torch.arange(height).repeat_interleave(width)
    column = torch.arange(width).repeat(height)
    down, across = (row[:, None] - row).abs(), (column[:, None] - column).abs()
    seen = (down + across if config.metric == "manhattan" else torch.maximum(down, across)) <= config.radius
    return F.pad(seen, (1, 0, 1, 0), value=True) if config.pooling == "cls" else seen


def norm_of(config: MegakrauseViTConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class MegakrauseViTEmbeddings(nn.Module):
    def __init__(self, config: MegakrauseViTConfig):
        super().__init__()
        patch, width = config.patch_size, config.hidden_size
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(config.num_channels, width, patch, patch)})
        patches = math.prod(side // patch for side in config.image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.pooling == "cls" else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, patches + (self.cls_token is not None), width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embeddings["projection"](pixel_values).flatten(2).mT
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.position_embeddings


class MegakrauseViTAttention(nn.Module):
    def __init__(self, config: MegakrauseViTConfig, layer: int):
        super().__init__()
        self.head_dim, self.top_k, self.sigma = config.head_dim, config.krause_top_k[layer], config.krause_sigma
        width = config.num_attention_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(config.hidden_size, width, bias=config.qkv_bias) for _ in range(3)
        )
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.bias)
        self.log_sigma: nn.Parameter | None = None
        if config.attention[layer] == "krause":
            count = 1 if config.shared_sigma else config.num_attention_heads
            self.log_sigma = nn.Parameter(torch.full((count,), math.log(config.krause_sigma)))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections)  # b h s d
        if self.log_sigma is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = self._krause(q, k, v, seen, self.log_sigma)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def _krause(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, log_sigma: Tensor) -> Tensor:
        dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = q.to(compute), k.to(compute), v.to(compute)
            z = q @ k.mT - k.square().sum(-1).unsqueeze(-2) / 2
            keep = seen
            if self.top_k is not None and self.top_k < z.shape[-1]:
                last = z.detach().masked_fill(~seen, -torch.inf).topk(self.top_k, dim=-1).values[..., -1:]
                keep = seen & (z >= last)
            scores = z * torch.exp(-2 * log_sigma.to(compute))[:, None, None]
            return (torch.softmax(scores.masked_fill(~keep, -torch.inf), dim=-1) @ v).to(dtype)


class MegakrauseViTMLP(nn.Module):
    def __init__(self, config: MegakrauseViTConfig):
        super().__init__()
        self.gate: nn.Linear | None = None
        if config.mlp == "swiglu":
            self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)) if self.gate is None else F.silu(self.gate(x)) * self.fc1(x))


class MegakrauseViTLayer(nn.Module):
    def __init__(self, config: MegakrauseViTConfig, layer: int):
        super().__init__()
        self.post_norm = config.post_norm
        self.layernorm_before, self.layernorm_after = norm_of(config), norm_of(config)
        self.attention = MegakrauseViTAttention(config, layer)
        self.mlp = MegakrauseViTMLP(config)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        if self.post_norm:
            x = self.layernorm_before(x + self.attention(x, seen))
            return self.layernorm_after(x + self.mlp(x))
        x = x + self.attention(self.layernorm_before(x), seen)
        return x + self.mlp(self.layernorm_after(x))


class MegakrauseViTModel(nn.Module):
    def __init__(self, config: MegakrauseViTConfig):
        super().__init__()
        self.embeddings = MegakrauseViTEmbeddings(config)
        self.layers = nn.ModuleList(MegakrauseViTLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.layernorm = norm_of(config)


class MegakrauseViTForImageClassification(PreTrainedModel):
    config_class = MegakrauseViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    _no_split_modules = ["MegakrauseViTLayer"]

    def __init__(self, config: MegakrauseViTConfig):
        super().__init__(config)
        self.vit = MegakrauseViTModel(config)
        classes: Any = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, classes, bias=config.bias)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits [b, classes] of pixel_values [b, c, height, width], and the loss where labels, int64 [b], are
        given."""
        config: Any = self.config
        seen = neighbourhood(config).to(pixel_values.device)
        x = self.vit.embeddings(pixel_values)
        for layer in self.vit.layers:
            x = layer(x, seen)
        x = self.vit.layernorm(x)
        logits = self.classifier(x[:, 0] if self.config.pooling == "cls" else x.mean(1))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MegakrauseViTAttention) and module.log_sigma is not None:
            init.constant_(module.log_sigma, math.log(module.sigma))
        if isinstance(module, MegakrauseViTEmbeddings):
            init.normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.cls_token is not None:
                init.normal_(module.cls_token, std=self.config.initializer_range)

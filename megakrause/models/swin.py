"""The shifted-window transformer (Liu et al., "Swin Transformer", arXiv 2103.14030), with Krause attention or softmax
in its windows. Activations are [b, height, width, e] here: b images, a grid of patches."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import ModelConfig
from megakrause.models.init import constant, normal
from megakrause.models.layout import Layout
from megakrause.ops.feature_dropout import Noise


class ShiftedWindowAttention(nn.Module):
    """Within windows of w x w patches, which lie `shift` patches further down and right than the grid begins; what is
    moved over an edge sees nothing of the other side.

    With q and k divided by sqrt(d), sigma = exp(log_sigma) and a bias B for each head and relative position,
    p = softmax(z / sigma^2 + B) over a window, z = q.k - |k|^2 / 2 (Krause Synchronization Transformers, arXiv
    2602.11534: -|q - k|^2 / (2 sigma^2) up to a constant of the row). Softmax attention has q.k / sqrt(d) + B."""

    def __init__(self, width: int, heads: int, window: int, shift: int, kind: str, sigma: float, std: float):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.query, self.key, self.value, self.output = (_linear(width, width, std) for _ in range(4))
        self.bias_table = normal(nn.Parameter(torch.empty((2 * window - 1) ** 2, heads)), std)
        self.log_sigma: nn.Parameter | None = None
        if kind == "krause":
            self.log_sigma = constant(nn.Parameter(torch.empty(heads)), math.log(sigma))

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, height, width, e], sides multiples of the window. Returns the same shape."""
        b, height, width, _ = x.shape
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        windows = self._windows(x)  # n w*w e
        q, k, v = (
            f(windows).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )  # n h w*w d
        bias = self.bias_table[relative_positions(self.window, x.device)].permute(2, 0, 1)  # h w*w w*w
        if self.log_sigma is None:
            scores = q @ k.mT / q.shape[-1] ** 0.5
        else:
            q, k = q / q.shape[-1] ** 0.5, k / k.shape[-1] ** 0.5
            scores = (q @ k.mT - k.square().sum(-1).unsqueeze(-2) / 2) * torch.exp(-2 * self.log_sigma)[:, None, None]
        scores = scores + bias
        if self.shift:
            apart = self._apart(height, width, x.device).repeat(b, 1, 1)[:, None]  # n 1 w*w w*w
            scores = scores.masked_fill(apart, torch.finfo(scores.dtype).min)
        out = self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        rows, columns, w = height // self.window, width // self.window, self.window
        out = out.view(b, rows, columns, w, w, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, height, width, -1)
        return torch.roll(out, (self.shift, self.shift), (1, 2))

    def _windows(self, x: Tensor) -> Tensor:
        """[b, height, width, e] -> [b * windows, w * w, e]."""
        b, height, width, e = x.shape
        w = self.window
        x = x.view(b, height // w, w, width // w, w, e).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, w * w, e)

    def _apart(self, height: int, width: int, device: torch.device) -> Tensor:
        """bool [windows, w*w, w*w]: which two patches of a window come from different sides of the image."""

        def side(length: int) -> Tensor:
            place = torch.arange(length, device=device)
            return (place >= length - self.window).long() + (place >= length - self.shift).long()

        region = self._windows((3 * side(height)[:, None] + side(width))[None, :, :, None])[..., 0]
        return region[:, :, None] != region[:, None]


def relative_positions(window: int, device: torch.device) -> Tensor:
    """int64 [w*w, w*w]: the row of a bias table for a query (row) and a key."""
    place = torch.arange(window, device=device)
    row, column = place.repeat_interleave(window), place.repeat(window)
    down, across = row[:, None] - row + window - 1, column[:, None] - column + window - 1
    return down * (2 * window - 1) + across


class SwinBlock(nn.Module):
    def __init__(self, config: ModelConfig, stage: int, layer: int, number: int):
        """number: of the block in the whole model; layer: in its stage."""
        super().__init__()
        width, side = config.width << stage, min(*config.stage_grids[stage], config.window or 1)
        shift = side // 2 if layer % 2 and side < min(config.stage_grids[stage]) else 0
        kind = config.attention_of_layers[number]
        heads = config.heads << stage
        self.attention_norm, self.mlp_norm = (_norm(width, config) for _ in range(2))
        self.attention = ShiftedWindowAttention(width, heads, side, shift, kind, config.sigma, config.init_std)
        self.up = _linear(width, config.mlp_width << stage, config.init_std)
        self.down = _linear(config.mlp_width << stage, width, config.init_std)
        self.drop_path = config.drop_path * number / max(1, config.layers - 1)
        self.numbers = [zlib.crc32(f"blocks.{number}.{part}".encode()) for part in ("attention", "mlp")]

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        x = x + self._dropped(self.attention(self.attention_norm(x)), noise, 0)
        return x + self._dropped(self.down(F.gelu(self.up(self.mlp_norm(x)))), noise, 1)

    def _dropped(self, x: Tensor, noise: Noise | None, part: int) -> Tensor:
        if noise is None or self.drop_path == 0:
            return x
        return noise.drop_sequences(x.flatten(1, 2), self.numbers[part], self.drop_path).view(x.shape)


class PatchMerging(nn.Module):
    """Four patches become one, of twice the width."""

    def __init__(self, width: int, config: ModelConfig):
        super().__init__()
        self.norm = _norm(4 * width, config)
        self.reduction = _linear(4 * width, 2 * width, config.init_std, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class SwinTransformer(nn.Module):
    """Logits of the classes of images. Parameters are uninitialized until `initialize` or a checkpoint fills them.

    It is not cut over ranks: they share images, and by ZeRO what the optimizer holds."""

    def __init__(self, config: ModelConfig, layout: Layout | None = None):
        super().__init__()
        assert config.patch_size is not None and config.depths is not None and config.classes is not None
        self.config, self.layout = config, layout or Layout()
        self.embedding = nn.Conv2d(config.channels, config.width, config.patch_size, config.patch_size)
        normal(self.embedding.weight, config.init_std)
        assert self.embedding.bias is not None
        constant(self.embedding.bias, 0.0)
        self.embedding_norm = _norm(config.width, config)
        self.stages = nn.ModuleList()
        number = 0
        for stage, depth in enumerate(config.depths):
            blocks = [SwinBlock(config, stage, layer, number + layer) for layer in range(depth)]
            self.stages.append(nn.ModuleList(blocks))
            number += depth
        last = len(config.depths) - 1
        self.merging = nn.ModuleList(PatchMerging(config.width << stage, config) for stage in range(last))
        self.norm = _norm(config.width << last, config)
        self.head = _linear(config.width << last, config.classes, config.init_std)

    def forward(self, x: Tensor, length: int | None = None, seeds: Tensor | None = None) -> Tensor:
        """Logits [b, classes] of images x, [b, c, height, width]. seeds: int64 [b], for images whose blocks are left
        out, a number of its own for each image and epoch; without them, and in evaluation mode, none are."""
        noise = Noise(seeds, 0) if seeds is not None and self.training else None
        x = self.embedding(x.to(self.embedding.weight.dtype)).permute(0, 2, 3, 1)
        x = self.embedding_norm(x)
        for stage, blocks in enumerate(self.stages):
            if stage:
                x = self.merging[stage - 1](x)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = self.layout.run("full", block, x, noise)
        return self.head(self.norm(x).mean((1, 2)))


def _linear(inputs: int, outputs: int, std: float, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    normal(layer.weight, std)
    if bias:
        constant(layer.bias, 0.0)
    return layer


def _norm(width: int, config: ModelConfig) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=config.norm_eps)
    constant(norm.weight, 1.0)
    constant(norm.bias, 0.0)
    return norm

"""One transformer block: attention and an MLP, each added to the stream."""

from __future__ import annotations

import zlib

from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import ModelConfig
from megakrause.models.attention import (
    Cache,
    Core,
    GridKrauseCore,
    GridSoftmaxCore,
    SelfAttention,
    Sequence,
    causal_core,
    marked,
)
from megakrause.models.dual import DualAttention, DualCache
from megakrause.models.layout import Layout
from megakrause.models.lora import add_adapters
from megakrause.models.norm import build_norm
from megakrause.ops.feature_dropout import Noise
from megakrause.parallel.linear import ColumnParallelLinear, RowParallelLinear

LayerCache = Cache | DualCache


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.layout = layout
        self.gate, self.up = (_up(config, layout) for _ in range(2))
        self.down = _down(config, layout)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        x, noise = self.layout.tp.enter(x, sequence.length), sequence.noise
        x = self.layout.run("selective", self._term, self.gate(x, noise), self.up(x, noise), noise)
        return self.down.sum(x, self.layout.tp)

    def _term(self, gate: Tensor, up: Tensor, noise: Noise | None) -> Tensor:
        return self.down(F.silu(gate) * up, noise)


class GeluMLP(nn.Module):
    """Feed-forward layer with the exact GELU (Hendrycks & Gimpel, arXiv 1606.08415)."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.layout = layout
        self.up, self.down = _up(config, layout), _down(config, layout)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        x, noise = self.layout.tp.enter(x, sequence.length), sequence.noise
        x = self.layout.run("selective", self._term, self.up(x, noise), noise)
        return self.down.sum(x, self.layout.tp)

    def _term(self, up: Tensor, noise: Noise | None) -> Tensor:
        return self.down(F.gelu(up), noise)


def _up(config: ModelConfig, layout: Layout) -> ColumnParallelLinear:
    layer = ColumnParallelLinear(config.width, config.mlp_width, layout.tp.axis, bias=config.bias)
    return marked(layer, config.init_std)


def _down(config: ModelConfig, layout: Layout) -> RowParallelLinear:
    layer = RowParallelLinear(config.mlp_width, config.width, layout.tp.axis, bias=config.bias)
    return marked(layer, config.deep_init_std)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, layout: Layout):
        super().__init__()
        self.tp, self.post, self.dropout = layout.tp, config.norm_placement == "post", config.dropout
        self.drop_path = config.drop_path * layer / max(1, config.layers - 1)
        self.numbers = [zlib.crc32(f"blocks.{layer}.{part}".encode()) for part in ("attention", "mlp")]
        self.attention_norm = build_norm(config, self.tp.whole)
        self.attention = _attention(config, layer, layout)
        self.mlp_norm = build_norm(config, self.tp.whole)
        self.mlp = (SwiGLU if config.mlp == "swiglu" else GeluMLP)(config, layout)
        if config.lora is not None:
            add_adapters(self, config.lora, self.tp.axis)

    def forward(self, x: Tensor, sequence: Sequence, cache: LayerCache | None = None) -> Tensor:
        if self.post:
            x = self.attention_norm(x + self._dropped(self.attention(x, sequence, cache), sequence, 0))
            return self.mlp_norm(x + self._dropped(self.mlp(x, sequence), sequence, 1))
        x = x + self._dropped(self.attention(self.attention_norm(x), sequence, cache), sequence, 0)
        return x + self._dropped(self.mlp(self.mlp_norm(x), sequence), sequence, 1)

    def _dropped(self, x: Tensor, sequence: Sequence, part: int) -> Tensor:
        """What a part adds, with dropout and as a whole left out for some sequences (stochastic depth, Huang et al.,
        arXiv 1603.09382)."""
        noise, number = sequence.noise, self.numbers[part]
        if noise is not None and self.dropout > 0:
            x = noise.at(self.tp.positions(sequence.length)).drop(x, number, 0, self.dropout)
        if noise is not None and self.drop_path > 0:
            x = noise.drop_sequences(x, number ^ 1, self.drop_path)
        return x

    def new_cache(self, room: int = 0) -> LayerCache:
        return self.attention.new_cache(room)


def _attention(config: ModelConfig, layer: int, layout: Layout) -> SelfAttention:
    kind = config.attention_of_layers[layer]
    core: Core
    if kind == "dual":
        return DualAttention(config, layout)
    if config.kind != "vit":
        core = causal_core(config, kind, layout)
    elif kind == "krause":
        core = GridKrauseCore(config, layer, layout)
    else:
        core = GridSoftmaxCore(layout)
    return SelfAttention(config, core, layout)

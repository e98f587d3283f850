"""One transformer block: pre-norm attention and a SwiGLU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import ModelConfig
from megakrause.models.attention import Cache, SelfAttention, Sequence, marked
from megakrause.models.dual import DualAttention, DualCache
from megakrause.models.layout import Layout
from megakrause.models.lora import add_adapters
from megakrause.models.norm import RMSNorm
from megakrause.ops.feature_dropout import Noise
from megakrause.parallel.linear import ColumnParallelLinear, RowParallelLinear

LayerCache = Cache | DualCache


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.layout, tp = layout, layout.tp
        self.gate, self.up = (
            marked(ColumnParallelLinear(config.width, config.mlp_width, tp.axis), config.init_std) for _ in range(2)
        )
        self.down = marked(RowParallelLinear(config.mlp_width, config.width, tp.axis), config.deep_init_std)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        x, noise = self.layout.tp.enter(x, sequence.length), sequence.noise
        x = self.layout.run("selective", self._down, self.gate(x, noise), self.up(x, noise), noise)
        return self.layout.tp.leave(x)

    def _down(self, gate: Tensor, up: Tensor, noise: Noise | None) -> Tensor:
        return self.down(F.silu(gate) * up, noise)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, layout: Layout):
        super().__init__()
        tp = layout.tp
        self.attention_norm = RMSNorm(config.width, config.norm_eps, tp.whole)
        kind = config.attention_of_layers[layer]
        self.attention = DualAttention(config, layout) if kind == "dual" else SelfAttention(config, kind, layout)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, tp.whole)
        self.mlp = SwiGLU(config, layout)
        if config.lora is not None:
            add_adapters(self, config.lora, tp.axis)

    def forward(self, x: Tensor, sequence: Sequence, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), sequence, cache)
        return x + self.mlp(self.mlp_norm(x), sequence)

    def new_cache(self) -> LayerCache:
        return self.attention.new_cache()

"""The vision transformer (Dosovitskiy et al., arXiv 2010.11929), with Krause attention over the grid of patches, or
softmax over all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import ModelConfig
from megakrause.models.attention import Sequence, marked
from megakrause.models.init import constant, normal
from megakrause.models.layout import Layout
from megakrause.models.norm import build_norm
from megakrause.models.transformer import Transformer, drop_embedding
from megakrause.ops.feature_dropout import Noise
from megakrause.parallel.collectives import collect
from megakrause.parallel.linear import ColumnParallelLinear, TensorParallel


class PatchEmbedding(nn.Module):
    """Patches as tokens, in raster order, after the token that a class is read from if there is one."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        assert config.patch_size is not None and config.length is not None
        self.tp, self.patch_size = tp, config.patch_size
        shape = config.width, config.channels, config.patch_size, config.patch_size
        self.weight = normal(nn.Parameter(torch.empty(shape)), config.init_std)
        self.bias = constant(nn.Parameter(torch.empty(config.width)), 0.0)
        self.positions = normal(nn.Parameter(torch.empty(config.length, config.width)), config.init_std)
        self.cls: nn.Parameter | None = None
        if config.pooling == "cls":
            self.cls = normal(nn.Parameter(torch.empty(config.width)), config.init_std)

    def forward(self, images: Tensor) -> Tensor:
        """images: [b, c, height, width]. Returns [b, s, e], or this rank's share of s."""
        whole = self.tp.whole
        weight = whole(self.weight)
        x = F.conv2d(images.to(weight.dtype), weight, whole(self.bias), stride=self.patch_size)
        x = x.flatten(2).transpose(1, 2)  # b s e
        if self.cls is not None:
            x = torch.cat([whole(self.cls).expand(len(x), 1, -1), x], dim=1)
        x = x + whole(self.positions)
        return x[:, self.tp.positions(x.shape[1])]


class ClassHead(nn.Module):
    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        assert config.classes is not None
        self.tp, self.classes, self.mean = tp, config.classes, config.pooling == "mean"
        self.norm = build_norm(config, tp.whole)
        output = ColumnParallelLinear(config.width, config.classes, tp.axis, bias=config.bias)
        self.output = marked(output, config.init_std)

    def forward(self, x: Tensor, length: int) -> Tensor:
        """x: [b, length, e], or this rank's share of positions. Returns [b, classes], the same on all ranks."""
        x = self.tp.enter(self.norm(x), length)
        x = x.mean(1) if self.mean else x[:, 0]
        return collect(self.output(x), self.tp.axis, -1, self.classes)


class VisionTransformer(Transformer):
    """Logits of the classes of images."""

    def __init__(self, config: ModelConfig, layout: Layout | None = None):
        """layout: how it is cut over ranks; None: not."""
        layout = layout or Layout()
        embedding = PatchEmbedding(config, layout.tp) if layout.is_first else None
        super().__init__(config, layout, embedding, ClassHead(config, layout.tp) if layout.is_last else None)

    def forward(self, x: Tensor, length: int | None = None, seeds: Tensor | None = None) -> Tensor:
        """Logits [b, classes] of images x, [b, c, height, width], in the model's precision or higher; of a later
        pipeline stage, x is what the one before it returned, and of one that is not the last, a stream for the next.

        length: must be the positions of a sequence, if given. seeds: int64 [b], of dropout, a number of its own for
        each image and epoch; without them, and in evaluation mode, nothing is dropped."""
        s = self.config.length
        assert s is not None and length in (None, s)
        noise = Noise(seeds, 0) if seeds is not None and self.training else None
        sequence = Sequence(0, s, None, None, noise)
        if self.embedding is not None:
            x = drop_embedding(self.embedding(x), self.config, sequence, self.layout.tp)
        x = self.run_blocks(x, sequence)
        return x if self.head is None else self.head(x, s)

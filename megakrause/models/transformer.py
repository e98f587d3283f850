"""What all models are: an embedding, blocks and a head, between which a pipeline can cut."""

from __future__ import annotations

import zlib
from collections.abc import Sequence as List
from typing import cast

from torch import Tensor, nn

from megakrause.config import ModelConfig
from megakrause.models.attention import Sequence
from megakrause.models.block import Block, LayerCache
from megakrause.models.layout import Layout
from megakrause.parallel.linear import TensorParallel

EMBEDDING = zlib.crc32(b"embedding")  # what its dropout is told by


class Transformer(nn.Module):
    """Parameters are uninitialized until `initialize` or a checkpoint fills them.

    A pipeline stage has the embedding only if it is the first, the head only if it is the last, and its own blocks,
    by the names that they have in the whole model."""

    def __init__(self, config: ModelConfig, layout: Layout, embedding: nn.Module | None, head: nn.Module | None):
        super().__init__()
        self.config, self.layout = config, layout
        self.embedding = embedding
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer, layout) for layer in layout.layers(config)})
        self.head = head

    @property
    def layers(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks.values()]

    def run_blocks(self, x: Tensor, sequence: Sequence, caches: List[LayerCache] | None = None) -> Tensor:
        """The stream after this stage's blocks, [b, s, e], or this rank's share of s."""
        for i, block in enumerate(self.layers):
            x = self.layout.run("full", block, x, sequence) if caches is None else block(x, sequence, caches[i])
        return x


def drop_embedding(x: Tensor, config: ModelConfig, sequence: Sequence, tp: TensorParallel) -> Tensor:
    """Dropout of what goes into the first block, where a model has one."""
    if sequence.noise is None or config.dropout == 0:
        return x
    return sequence.noise.at(tp.positions(sequence.length)).drop(x, EMBEDDING, 0, config.dropout)

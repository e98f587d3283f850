"""The decoder: of text, or of the pixel values of images, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import ModelConfig
from megakrause.errors import UserError
from megakrause.models.attention import Sequence, marked
from megakrause.models.block import LayerCache
from megakrause.models.init import normal
from megakrause.models.layout import Layout
from megakrause.models.lora import prepare
from megakrause.models.norm import build_norm
from megakrause.models.transformer import Transformer, drop_embedding
from megakrause.ops.feature_dropout import Noise
from megakrause.ops.rotary import rotary_angles
from megakrause.parallel.linear import ColumnParallelLinear, TensorParallel
from megakrause.parallel.vocab import VocabParallelEmbedding


class ModelCache:
    """The layers' caches and how many positions went through them."""

    def __init__(self, layers: list[LayerCache]):
        self.layers = layers
        self.position = 0


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, layout: Layout):
        super().__init__()
        self.tp = tp = layout.tp
        self.tokens = VocabParallelEmbedding(vocab_size, config.width, tp.axis)
        normal(self.tokens.weight, config.init_std)
        self.positions: nn.Embedding | None = None
        if config.positions == "learned":
            assert config.num_positions is not None
            self.positions = nn.Embedding(config.num_positions, config.width)
            normal(self.positions.weight, config.init_std)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [b, s]; positions [s], or [b, s] where each sequence has its own."""
        x = self.tp.leave(self.tokens(tokens))  # b s e
        if self.positions is None:
            return x
        mine = positions[..., self.tp.positions(positions.shape[-1])]
        return x + F.embedding(mine, self.tp.whole(self.positions.weight))


class Head(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm = build_norm(config, tp.whole)
        output = ColumnParallelLinear(config.width, vocab_size, tp.axis, bias=config.bias)
        self.output = marked(output, config.init_std)

    def forward(self, x: Tensor, length: int) -> Tensor:
        return self.output(self.tp.enter(self.norm(x), length))  # b s v/tp


class LanguageModel(Transformer):
    """Logits of the next token."""

    embedding: Embedding | None
    head: Head | None

    def __init__(self, config: ModelConfig, layout: Layout | None = None):
        """layout: how it is cut over ranks; None: not. Raises UserError without a vocab_size."""
        layout = layout or Layout()
        if config.vocab_size is None:
            raise UserError("model.vocab_size is missing; set it, or build the model with its tokenizer")
        embedding = Embedding(config, config.vocab_size, layout) if layout.is_first else None
        head = Head(config, config.vocab_size, layout.tp) if layout.is_last else None
        super().__init__(config, layout, embedding, head)
        if config.tie_embeddings and self.head is not None:
            if self.embedding is not None:
                self.head.output.weight = self.embedding.tokens.weight
            else:
                self.head.output.weight.copy_of = "embedding.tokens.weight"  # type: ignore[attr-defined]
        if config.lora is not None:
            prepare(self)

    def forward(
        self,
        x: Tensor,
        doc_start: Tensor | None = None,
        cache: ModelCache | None = None,
        length: int | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Logits [b, s, v], or this rank's share of v, after each of the tokens x, int64 [b, s]; of a later pipeline
        stage, x is what the one before it returned, and of one that is not the last, a stream for the next.

        Context-parallel ranks take and return their own s of the positions. doc_start: int32 [b, of all ranks], as in
        `TokenBatch`. cache: what `new_cache` gave; the tokens go on from its position. length: s, where x is a stream.
        seeds: int64 [b], of dropout, a number of its own for each sequence and epoch; without them, and in evaluation
        mode, nothing is dropped. Raises UserError when learned positions run out."""
        s = length or x.shape[1]
        start = self.layout.cp.rank * s if cache is None else cache.position
        limit = self.config.num_positions
        if self.config.positions == "learned" and limit is not None and start + s > limit:
            raise UserError(
                f"{start + s} positions are more than the learned ones; use at most model.max_positions = {limit}"
            )
        positions = torch.arange(start, start + s, device=x.device)
        rotary = None
        if self.config.positions == "rope":
            rotary = rotary_angles(positions, self.config.head_size, self.config.rope_theta, self.config.rope_scaling)
        elif doc_start is not None:  # a document's own, as if it stood alone
            positions = positions - doc_start[:, start : start + s]
        noise = Noise(seeds, start) if seeds is not None and self.training else None
        sequence = Sequence(start, s, rotary, doc_start, noise)
        if self.embedding is not None:
            x = drop_embedding(self.embedding(x, positions), self.config, sequence, self.layout.tp)
        x = self.run_blocks(x, sequence, None if cache is None else cache.layers)
        if cache is not None:
            cache.position += s
        return x if self.head is None else self.head(x, s)

    def new_cache(self, room: int = 0) -> ModelCache:
        """An empty cache: `window` entries for a layer that has one, as many as there are positions for the others.
        room: positions that it will have, if that is known: else it may hold up to three times as many at a time."""
        return ModelCache([block.new_cache(room) for block in self.layers])

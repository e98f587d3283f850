"""The decoder language model: an embedding, blocks and a head, each a layer that a pipeline can cut between."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megakrause.config import ModelConfig
from megakrause.errors import UserError
from megakrause.models.attention import Cache, Sequence, linear
from megakrause.models.block import Block, RMSNorm
from megakrause.models.init import normal
from megakrause.ops.rotary import rotary_angles


class ModelCache:
    """The layers' caches and how many positions went through them."""

    def __init__(self, layers: list[Cache]):
        self.layers = layers
        self.position = 0


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.width)
        normal(self.tokens.weight, config.init_std)
        self.positions: nn.Embedding | None = None
        if config.positions == "learned":
            assert config.max_positions is not None
            self.positions = nn.Embedding(config.max_positions, config.width)
            normal(self.positions.weight, config.init_std)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.tokens(tokens)  # b s e
        return x if self.positions is None else x + self.positions(positions)


class Head(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = linear(config.width, vocab_size, config.init_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(x))  # b s v


class LanguageModel(nn.Module):
    """Logits of the next token. Parameters are uninitialized until `initialize` or a checkpoint fills them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise UserError("model.vocab_size is missing; set it, or build the model with its tokenizer")
        self.config = config
        self.embedding = Embedding(config, config.vocab_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.head = Head(config, config.vocab_size)
        if config.tie_embeddings:
            self.head.output.weight = self.embedding.tokens.weight

    def forward(self, tokens: Tensor, doc_start: Tensor | None = None, cache: ModelCache | None = None) -> Tensor:
        """Logits [b, s, v] after each of the tokens, int64 [b, s].

        doc_start: int32 [b, s], as in `TokenBatch`. cache: what `new_cache` gave; the tokens go on from its position.
        Raises UserError when learned positions run out."""
        start = 0 if cache is None else cache.position
        s = tokens.shape[1]
        limit = self.config.max_positions
        if self.config.positions == "learned" and limit is not None and start + s > limit:
            raise UserError(
                f"{start + s} positions are more than the learned ones; use at most model.max_positions = {limit}"
            )
        positions = torch.arange(start, start + s, device=tokens.device)
        rotary = None
        if self.config.positions == "rope":
            rotary = rotary_angles(positions, self.config.head_size, self.config.rope_theta)
        sequence = Sequence(start, s, rotary, doc_start)
        x = self.embedding(tokens, positions)
        for i, block in enumerate(self.blocks):
            x = block(x, sequence, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.position += s
        return self.head(x)

    def new_cache(self) -> ModelCache:
        """An empty cache: `window` entries for a Krause layer, as many as there are positions for a softmax layer."""
        return ModelCache([block.new_cache() for block in self.blocks])  # type: ignore[operator]

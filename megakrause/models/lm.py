"""The decoder language model: an embedding, blocks and a head, each a layer that a pipeline can cut between."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakrause.config import ModelConfig
from megakrause.errors import UserError
from megakrause.models.attention import Cache, Sequence, marked
from megakrause.models.block import Block, RMSNorm
from megakrause.models.init import normal
from megakrause.ops.rotary import rotary_angles
from megakrause.parallel.linear import ColumnParallelLinear, TensorParallel
from megakrause.parallel.vocab import VocabParallelEmbedding


class ModelCache:
    """The layers' caches and how many positions went through them."""

    def __init__(self, layers: list[Cache]):
        self.layers = layers
        self.position = 0


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.tokens = VocabParallelEmbedding(vocab_size, config.width, tp.axis)
        normal(self.tokens.weight, config.init_std)
        self.positions: nn.Embedding | None = None
        if config.positions == "learned":
            assert config.max_positions is not None
            self.positions = nn.Embedding(config.max_positions, config.width)
            normal(self.positions.weight, config.init_std)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.tp.leave(self.tokens(tokens))  # b s e
        if self.positions is None:
            return x
        mine = positions[self.tp.positions(len(positions))]
        return x + F.embedding(mine, self.tp.whole(self.positions.weight))


class Head(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm = RMSNorm(config.width, config.norm_eps, tp)
        self.output = marked(ColumnParallelLinear(config.width, vocab_size, tp.axis), config.init_std)

    def forward(self, x: Tensor, length: int) -> Tensor:
        return self.output(self.tp.enter(self.norm(x), length))  # b s v/tp


class LanguageModel(nn.Module):
    """Logits of the next token. Parameters are uninitialized until `initialize` or a checkpoint fills them."""

    def __init__(self, config: ModelConfig, tp: TensorParallel | None = None):
        """tp: how it is cut over ranks; None: not. Raises UserError for heads that cannot be cut so."""
        super().__init__()
        tp = tp or TensorParallel()
        check_cut(config, tp.axis.size)
        if config.vocab_size is None:
            raise UserError("model.vocab_size is missing; set it, or build the model with its tokenizer")
        self.config = config
        self.embedding = Embedding(config, config.vocab_size, tp)
        self.blocks = nn.ModuleList(Block(config, layer, tp) for layer in range(config.layers))
        self.head = Head(config, config.vocab_size, tp)
        if config.tie_embeddings:
            self.head.output.weight = self.embedding.tokens.weight

    def forward(self, tokens: Tensor, doc_start: Tensor | None = None, cache: ModelCache | None = None) -> Tensor:
        """Logits [b, s, v], or this rank's share of v, after each of the tokens, int64 [b, s].

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
        return self.head(x, s)

    def new_cache(self) -> ModelCache:
        """An empty cache: `window` entries for a layer that has one, as many as there are positions for the others."""
        return ModelCache([block.new_cache() for block in self.blocks])  # type: ignore[operator]


def check_cut(config: ModelConfig, tp: int) -> None:
    """Raises UserError when attention heads cannot be shared by `tp` ranks."""
    legal = [n for n in range(1, config.heads + 1) if config.heads % n == 0 and _fits(config.num_kv_heads, n)]
    if tp not in legal:
        raise UserError(
            f"model.heads = {config.heads} and model.kv_heads = {config.num_kv_heads} cannot be shared by "
            f"{tp} tensor-parallel ranks; use one of {legal}"
        )


def _fits(kv_heads: int, tp: int) -> bool:
    return kv_heads % tp == 0 or tp % kv_heads == 0

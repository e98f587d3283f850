"""Drawing what follows, position by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megakrause.models.lm import LanguageModel

Step = Callable[[Tensor], Tensor]  # logits [b, s, v] after tokens int64 [b, s], which go on from those before


def cached_step(model: LanguageModel) -> Step:
    """A model with a new cache, which holds what went through it before."""
    cache = model.new_cache(model.config.num_positions or 0)
    return lambda tokens: model(tokens, cache=cache)


def continued(
    step: Step, start: Tensor, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> Iterator[Tensor]:
    """Yields the tokens that follow `start`, int64 [b, s], endlessly: [b] at a time.

    temperature: 0 takes the most likely token. top_p: draw from the smallest set of tokens with this probability."""
    generator = torch.Generator(start.device).manual_seed(seed)
    tokens = start
    while True:
        chosen = choose(step(tokens)[:, -1].float(), temperature, top_p, generator)
        yield chosen
        tokens = chosen[:, None]


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row, int64 [b], of logits [b, v]."""
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    if top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        p = torch.zeros_like(p).scatter(-1, index, ordered)
    return torch.multinomial(p, 1, generator=generator)[:, 0]

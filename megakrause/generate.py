"""Text from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megakrause.checkpoint.model import load_model, stored_tokenizer
from megakrause.checkpoint.read import find_checkpoint
from megakrause.errors import UserError
from megakrause.models.lm import LanguageModel


@torch.no_grad()
def generate_tokens(
    model: LanguageModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Yields the tokens that follow a prompt of at least one token, until `stop` (not yielded) or max_new_tokens.

    temperature: 0 takes the most likely token. top_p: draw from the smallest set of tokens with this probability.
    The cache makes every step cost the same for Krause layers, however long the text is."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    cache = model.new_cache()
    tokens = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        logits = model(tokens, cache=cache)[0, -1].float()  # v
        token = int(_choose(logits, temperature, top_p, generator))
        if token == stop:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax()
    p = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    if top_p < 1:
        ordered, index = p.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        p = torch.zeros_like(p).scatter(0, index, ordered)
    return torch.multinomial(p, 1, generator=generator)[0]


def generate_text(
    checkpoint: str, prompt: str, max_new_tokens: int, *, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """Yields the text that follows the prompt, piece by piece. The prompt opens a document. Raises UserError."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8 at character {error.start}") from error
    source = find_checkpoint(checkpoint)
    tokenizer = stored_tokenizer(source)
    model = load_model(source, "cuda" if torch.cuda.is_available() else "cpu")
    ids = [tokenizer.eos, *tokenizer.encode(prompt)]
    shown = tokenizer.decode(ids)  # with what follows: some tokenizers give the first word of a text no space
    for token in generate_tokens(
        model, ids, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=tokenizer.eos
    ):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose bytes are not all there yet
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]

"""Text and images from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megakrause.checkpoint.model import load_language_model, stored_config, stored_tokenizer
from megakrause.checkpoint.read import find_checkpoint
from megakrause.config import RunConfig
from megakrause.data.open import eval_images
from megakrause.errors import UserError
from megakrause.models.lm import LanguageModel
from megakrause.models.pictures import draw, grid, to_png, upper_half
from megakrause.models.sample import cached_step, continued

LARGE = 256  # pixels of a picture, at least, where images are small


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

    temperature and top_p: as of `continued`. The cache makes every step cost the same for Krause layers, however long
    the text is."""
    start = torch.tensor([prompt], device=next(model.parameters()).device)
    following = continued(cached_step(model), start, temperature=temperature, top_p=top_p, seed=seed)
    for tokens in islice(following, max_new_tokens):
        if (token := int(tokens[0])) == stop:
            return
        yield token


def generate_images(
    checkpoint: str,
    count: int,
    out: Path,
    *,
    complete: bool,
    prefix: str | None,
    temperature: float,
    top_p: float,
    seed: int,
) -> np.ndarray:
    """Draws images, uint8 [count, height, width, c], and writes a picture of them as PNG.

    complete: the lower halves of the first images of the corpus `prefix` (default: the config's data.valid), shown
    below what they were; else all but the first value, which is that of images of the corpus (default: data.train), or
    any where it is not there. Raises UserError."""
    source = find_checkpoint(checkpoint)
    config = stored_config(source)
    if config.model.kind != "image":
        raise UserError(f"{source.path} is a {config.model.kind}; images are drawn by a model of kind 'image'")
    model = load_language_model(source, "cuda" if torch.cuda.is_available() else "cpu")
    if complete:
        real = _real_images(config, prefix or config.data.valid, count)
        known = upper_half(real)
    else:
        known = _first_values(config, prefix, count, seed)
    total = int(np.prod(config.model.image_shape)) - known.shape[1]
    with tqdm(total=total, desc="drawing", unit="value") as bar:
        drawn = draw(
            cached_step(model),
            config.model,
            known.to(next(model.parameters()).device),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            progress=bar.update,
        )
    shown = drawn if not complete else np.concatenate([real, drawn])
    scale = max(1, -(-LARGE // (max(config.model.image_shape[:2]) * 8)))
    out.parent.mkdir(parents=True, exist_ok=True)
    to_png(grid(shown, count if complete else None, scale)).save(out, "PNG")
    return drawn


def _real_images(config: RunConfig, prefix: str | None, count: int) -> np.ndarray:
    """The first images of a corpus as the model sees them."""
    if prefix is None:
        raise UserError("there is no data.valid to complete images of; give --data PREFIX")
    samples = eval_images(config, prefix, workers=0)
    assert samples is not None
    if len(samples) < count:
        raise UserError(f"{prefix} has {len(samples)} images; --count {count} are too many")
    return samples.pixels(np.arange(count))


def _first_values(config: RunConfig, prefix: str | None, count: int, seed: int) -> Tensor:
    """Of images of the corpus, int64 [count, 1]; of none in particular where it is not there."""
    random = np.random.default_rng(seed)
    try:
        samples = eval_images(config, prefix or config.data.sources[0].path, workers=0)
        assert samples is not None
        pixels = samples.pixels(random.integers(len(samples), size=count))
        return torch.from_numpy(pixels.reshape(count, -1)[:, :1].astype(np.int64))
    except UserError as error:
        if prefix is not None:
            raise
        print(f"the first value of each image is any, for {error}", file=sys.stderr)
        return torch.from_numpy(random.integers(256, size=(count, 1)))


def generate_text(
    checkpoint: str, prompt: str, max_new_tokens: int, *, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """Yields the text that follows the prompt, piece by piece. The prompt opens a document. Raises UserError."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8 at character {error.start}") from error
    source = find_checkpoint(checkpoint)
    if (kind := stored_config(source).model.kind) != "lm":
        why = "draws images; give --output PNG" if kind == "image" else f"is a {kind}, which predicts no tokens"
        raise UserError(f"{source.path} {why}")
    tokenizer = stored_tokenizer(source)
    model = load_language_model(source, "cuda" if torch.cuda.is_available() else "cpu")
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

"""What data hands to models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of tokens cut from a corpus, or of the pixel values of images.

    A separator (end-of-document token) belongs, as input, to the document that it opens: it sees nothing before itself,
    and what follows sees it. So a document is always predicted from its first token on, and generation starts from
    the separator alone.
    """

    tokens: Tensor  # int64 [b, s]   inputs
    targets: Tensor  # int64 [b, s]   the token after each input
    loss_mask: Tensor  # bool [b, s]   False where there is nothing to learn: padding at the end of a sequence
    doc_start: Tensor | None  # int32 [b, s]   position of the first token that each may see; None: all before
    numbers: Tensor | None = None  # int64 [b]   of each sequence in its run, counted over epochs

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What a model is called with."""
        return (self.tokens,) if self.doc_start is None else (self.tokens, self.doc_start)

    def to(self, device: torch.device) -> TokenBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def __getitem__(self, rows: slice) -> TokenBatch:
        """Some of the sequences."""
        return self._map(lambda tensor: tensor[rows])

    def at(self, positions: slice) -> TokenBatch:
        """Some of the positions; `doc_start` stays that of all."""
        tokens, targets, loss_mask = (x[:, positions] for x in (self.tokens, self.targets, self.loss_mask))
        return TokenBatch(tokens, targets, loss_mask, self.doc_start, self.numbers)

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        doc_start, numbers = (None if x is None else change(x) for x in (self.doc_start, self.numbers))
        return TokenBatch(change(self.tokens), change(self.targets), change(self.loss_mask), doc_start, numbers)


@dataclass(frozen=True)
class ImageBatch:
    """Images and their classes."""

    images: Tensor  # float32 [b, c, height, width]   normalized
    targets: Tensor  # float32 [b, classes]   shares, 1 together
    loss_mask: Tensor  # bool [b]   False for a row of padding
    numbers: Tensor | None = None  # int64 [b]   of each image in its run, counted over epochs

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What a model is called with."""
        return (self.images,)

    def to(self, device: torch.device) -> ImageBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def __getitem__(self, rows: slice) -> ImageBatch:
        """Some of the images."""
        return self._map(lambda tensor: tensor[rows])

    def at(self, positions: slice) -> ImageBatch:
        """All of it: the positions of an image are not shared."""
        return self

    def _map(self, change: Callable[[Tensor], Tensor]) -> ImageBatch:
        numbers = None if self.numbers is None else change(self.numbers)
        return ImageBatch(change(self.images), change(self.targets), change(self.loss_mask), numbers)


Batch = TokenBatch | ImageBatch

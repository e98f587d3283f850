"""What data hands to models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of tokens cut from a corpus.

    A separator (end-of-document token) belongs, as input, to the document that it opens: it sees nothing before itself,
    and what follows sees it. So a document is always predicted from its first token on, and generation starts from
    the separator alone.
    """

    tokens: Tensor  # int64 [b, s]   inputs
    targets: Tensor  # int64 [b, s]   the token after each input
    loss_mask: Tensor  # bool [b, s]   False where the target is not to be learnt (a document nothing announces)
    doc_start: Tensor  # int32 [b, s]   position, in its sequence, of the first token that each token may see

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            *(t.to(device, non_blocking=True) for t in (self.tokens, self.targets, self.loss_mask, self.doc_start))
        )

    def __getitem__(self, rows: slice) -> TokenBatch:
        """Some of the sequences."""
        return TokenBatch(self.tokens[rows], self.targets[rows], self.loss_mask[rows], self.doc_start[rows])

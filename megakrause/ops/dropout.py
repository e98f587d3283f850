"""The dropout mask of attention weights as a pure function of (seed, batch x head, query, key)."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_mask(seed: int, head: Tensor, query: Tensor, key: Tensor, dropout: float) -> Tensor:
    """bool, True where the weight stays: Philox-4x32-10 (Salmon et al., SC 2011), first output word, counter
    (key, query, head, 0), key (seed's low and high 32 bits): the same bits as Triton's `tl.philox`.

    seed: below 2^63. head, query, key: int64, of shapes that broadcast together to the result's."""
    low32 = 0xFFFFFFFF
    c0, c1, c2 = key & low32, query & low32, head & low32
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & low32, (seed >> 32) & low32
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return c0 >= round(dropout * 2**32)


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product, in int64 arithmetic that cannot overflow."""
    high = x * (factor >> 16)
    low = x * (factor & 0xFFFF)
    middle = ((high & 0xFFFF) << 16) + low
    return (high >> 16) + (middle >> 32), middle & 0xFFFFFFFF

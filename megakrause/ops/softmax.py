"""Causal softmax attention in the calling style of `krause_attention`, over torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_mask(s: int, s_k: int, doc_start: Tensor | None, device: torch.device) -> Tensor | None:
    """bool [b or 1, 1, s, s_k], True where a query (one of the last s positions) sees a key; None where SDPA needs
    none. Built once a batch and shared by all layers.

    doc_start: int32 [b, s], the first key each query may see, on the key axis."""
    if doc_start is None and s in (1, s_k):
        return None
    keys = torch.arange(s_k, device=device)
    seen = (keys <= torch.arange(s_k - s, s_k, device=device)[:, None])[None]
    if doc_start is not None:
        seen = seen & (keys >= doc_start[:, :, None])
    return seen[:, None]


def softmax_attention(
    q: Tensor,  # [b, s, h, d]       queries: the last s of the s_k key positions
    k: Tensor,  # [b, s_k, h_kv, d]
    v: Tensor,  # [b, s_k, h_kv, d]
    mask: Tensor | None = None,  # what `causal_mask` gave for (s, s_k)
) -> Tensor:  # [b, s, h, d]
    """softmax(q k^T / sqrt(d)) v over the keys that each query sees."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # b h s d
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
    return out.transpose(1, 2)

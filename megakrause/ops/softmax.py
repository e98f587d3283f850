"""Causal softmax attention in the calling style of `krause_attention`: torch's own where it is full, the project's
kernels where a window or documents cut it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megakrause.ops.krause_launch import triton_refuses
from megakrause.ops.krause_operators import krause_attention_operator

DENSE_WINDOWS = 2  # up to so many windows, one dense product on a CPU beats cutting it into blocks


def softmax_attention(
    q: Tensor,  # [b, s, h, d]       queries: the last s of the s_k key positions
    k: Tensor,  # [b, s_k, h_kv, d]
    v: Tensor,  # [b, s_k, h_kv, d]
    *,
    window: int | None = None,
    doc_start: Tensor | None = None,  # int32 [b, s]  first key each query may see, on the key axis
    mask: Callable[[], Tensor | None] | None = None,
    backend: str = "auto",
) -> Tensor:  # [b, s, h, d]
    """softmax(q k^T / sqrt(d)) v over the keys that each query sees: up to its own, of these the last `window`.

    backend: "triton", or "auto": where keys are cut off, triton on a GPU; else torch's own and blocks.
    mask: gives what `causal_mask` gave for the same arguments; for layers that share one where a dense one is used."""
    s, s_k = q.shape[1], k.shape[1]
    if window is not None and window >= s_k:
        window = None
    cut = doc_start is not None or window is not None
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend = {backend!r}; use one of auto, triton")
    refusal = triton_refuses(q, window or s_k, None, None)
    if cut and backend == "triton" and refusal is not None:
        raise ValueError(f"backend = 'triton' takes {refusal}; use 'auto'")
    if cut and (q.is_cuda or backend == "triton") and refusal is None:
        return _by_kernel(q, k, v, window or s_k, doc_start, "triton")
    if window is not None and s_k > DENSE_WINDOWS * window and s > 1:
        unseen = max(0, s_k - s - (window - 1))  # by any query
        start = None if doc_start is None else doc_start.clamp(min=unseen) - unseen
        return _by_kernel(q, k[:, unseen:], v[:, unseen:], window, start, "blocked")
    seen = causal_mask(s, s_k, doc_start, q.device, window) if mask is None else mask()
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # b h s d
    causal = seen is None and s > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, window: int, doc_start: Tensor | None, backend: str) -> Tensor:
    """Krause attention without the norms of the keys and with sigma^2 = sqrt(d) is softmax attention."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    log_sigma = q.new_full((1,), q.shape[-1], dtype=dtype).log() / 4
    return krause_attention_operator(q, k, v, log_sigma, [window], None, doc_start, 0.0, 0, backend, False)[0]


def causal_mask(
    s: int, s_k: int, doc_start: Tensor | None, device: torch.device, window: int | None = None
) -> Tensor | None:
    """bool [b or 1, 1, s, s_k], True where a query (one of the last s positions) sees a key; None where SDPA needs
    none. The other arguments: as `softmax_attention` takes them."""
    if doc_start is None and window is None and s in (1, s_k):
        return None
    keys, queries = torch.arange(s_k, device=device), torch.arange(s_k - s, s_k, device=device)[:, None]
    seen = (keys <= queries)[None]
    if window is not None:
        seen = seen & (keys > queries - window)
    if doc_start is not None:
        seen = seen & (keys >= doc_start[:, :, None])
    return seen[:, None]

"""Krause attention, dense and obvious: the oracle of every other implementation. Definition: `ops/krause.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from megakrause.ops.dropout import keep_mask
from megakrause.ops.grid import Grid


def krause_reference(
    q: Tensor,  # [b, s, h, d]
    k: Tensor,  # [b, s_k, h_kv, d]
    v: Tensor,  # [b, s_k, h_kv, d]
    log_sigma: Tensor,  # [h] or [1]
    *,
    window: int | None,
    grid: Grid | None,
    top_k: int | None,
    doc_start: Tensor | None,
    dropout: float,
    seed: int | None,
) -> Tensor:  # [b, s, h, d]
    b, s, h, _ = q.shape
    s_k, group = k.shape[1], h // k.shape[2]
    p = krause_weights(q, k, log_sigma, window=window, grid=grid, top_k=top_k, doc_start=doc_start)
    if dropout > 0:
        assert seed is not None
        heads = torch.arange(b * h, device=q.device).view(b, h, 1, 1)
        queries = torch.arange(s_k - s, s_k, device=q.device)[:, None]
        p = p * keep_mask(seed, heads, queries, torch.arange(s_k, device=q.device), dropout) / (1 - dropout)
    return torch.einsum("bhij,bjhd->bihd", p, v.to(p.dtype).repeat_interleave(group, dim=2)).to(q.dtype)


def krause_weights(
    q: Tensor,  # [b, s, h, d]
    k: Tensor,  # [b, s_k, h_kv, d]
    log_sigma: Tensor,  # [h] or [1]
    *,
    window: int | None,
    grid: Grid | None,
    top_k: int | None,
    doc_start: Tensor | None = None,
) -> Tensor:  # [b, h, s, s_k], float32 or float64
    """p(i, j) of `krause_attention`'s definition."""
    s, s_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    qc, kc = q.to(compute), k.to(compute).repeat_interleave(group, dim=2)  # b s h d

    z = torch.einsum("bihd,bjhd->bhij", qc, kc) - kc.square().sum(-1).mT[:, :, None, :] / 2  # b h s s_k
    seen = visible(s, s_k, window, grid, doc_start, q.device)[:, None]  # b 1 s s_k
    keep = seen.expand_as(z)
    if top_k is not None and top_k < s_k:
        with torch.no_grad():
            last = z.masked_fill(~seen, -torch.inf).topk(top_k, dim=-1).values[..., -1:]
            keep = seen & ~(z < last)  # what is not a number is kept, and seen in the result

    # Dividing before masking, with a finite floor, keeps the gradient of log_sigma and of empty rows free of NaN.
    scores = z / torch.exp(2 * log_sigma.to(compute))[:, None, None]
    return torch.softmax(scores.masked_fill(~keep, torch.finfo(compute).min), dim=-1) * keep


def visible(
    s: int, s_k: int, window: int | None, grid: Grid | None, doc_start: Tensor | None, device: torch.device
) -> Tensor:
    """bool [b or 1, s, s_k]: which keys each query sees, before any selection."""
    queries = torch.arange(s_k - s, s_k, device=device)[:, None]
    keys = torch.arange(s_k, device=device)
    if grid is not None:
        seen = grid.mask(device)[None]
    else:
        assert window is not None
        seen = ((keys <= queries) & (keys > queries - window))[None]
    return seen if doc_start is None else seen & (keys >= doc_start[:, :, None])

"""Krause attention: its definition, the checks of its arguments and the choice of a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from megakrause.ops.grid import Grid
from megakrause.ops.krause_launch import triton_refuses
from megakrause.ops.krause_operators import krause_attention_operator, neighbourhood
from megakrause.ops.krause_reference import krause_reference

BACKENDS = ("auto", "reference", "blocked", "triton")


def krause_attention(
    q: Tensor,  # [b, s, h, d]       queries: the last s of the s_k key positions
    k: Tensor,  # [b, s_k, h_kv, d]  s_k >= s; h a multiple of h_kv
    v: Tensor,  # [b, s_k, h_kv, d]
    log_sigma: Tensor,  # [h] or [1]  log of each head's kernel width
    *,
    window: int | None = None,
    grid: Grid | None = None,
    top_k: int | None = None,
    doc_start: Tensor | None = None,  # int32 [b, s]  first key each query may see, on the key axis
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> Tensor:  # [b, s, h, d], dtype of q
    """Attention over the nearest keys of a neighbourhood (Krause Synchronization Transformers, arXiv 2602.11534).

    For query i of one head, with sigma = exp(log_sigma) and N(i) the neighbourhood of i:

        score(i, j) = -||q_i - k_j||^2 / (2 sigma^2)                    j in N(i)
        keep(i)     = the keys whose score is among the top_k largest of the row, ties with the last one included
        out_i       = sum_j p(i, j) v_j,    p(i, .) = softmax of score(i, .) over keep(i)

    -||q_i||^2 is the same in a whole row and changes neither the softmax nor the selection, so every backend computes

        z_ij = q_i . k_j - ||k_j||^2 / 2,    p = softmax(z / sigma^2)

    and compares z in float32 (in float64 for float64 inputs). There is no scaling by sqrt(d). The gradient takes the
    selection as constant. A query that sees no key at all gives zeros.

    window: N(i) = the `window` keys i - window + 1 .. i, itself included. grid: the neighbourhood of `Grid`, on a whole
    grid of tokens. Exactly one of the two. top_k: None, or at least the neighbourhood's size: no selection.
    doc_start: keys before it are not seen (packed documents, left padding, a missing halo).
    dropout: share of the weights p that is dropped, the others scaled by 1 / (1 - dropout); seed names the mask.
    backend: "reference" (dense, any arguments), "blocked" (memory and time linear in s; windows only), "triton" (fused
    kernels for CUDA) or "auto": triton on a CUDA device; elsewhere, and for what triton cannot take, blocked for
    windows and reference for grids.

    Raises ValueError for arguments that do not fit together or that the backend cannot take, naming the argument, its
    value and what would be right.
    """
    _check(q, k, v, log_sigma, window, grid, top_k, doc_start, dropout, seed)
    if window is not None:
        window = min(window, k.shape[1])  # what it reaches beyond the first key is nothing
    backend = _choose(q, window, grid, top_k, backend)
    if window is not None:
        k, v, doc_start = _last_keys(q, k, v, doc_start, window)
    if backend == "reference" or not len(q):  # an empty batch has nothing to cut into blocks or programs
        with torch.autocast(q.device.type, enabled=False):  # it would compare z in bfloat16
            return krause_reference(
                q,
                k,
                v,
                log_sigma,
                window=window,
                grid=grid,
                top_k=top_k,
                doc_start=doc_start,
                dropout=dropout,
                seed=seed,
            )
    seen = neighbourhood(window, grid)
    return krause_attention_operator(q, k, v, log_sigma, seen, top_k, doc_start, dropout, seed or 0, backend, True)[0]


def _choose(q: Tensor, window: int | None, grid: Grid | None, top_k: int | None, backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}; use one of {', '.join(BACKENDS)}")
    others = "reference" if window is None else "blocked"
    if backend == "blocked" and window is None:
        raise ValueError("backend = 'blocked' takes a window, no grid; use 'reference' or 'auto'")
    if backend == "triton":
        reason = triton_refuses(q, window, grid, top_k)
        if reason is not None:
            raise ValueError(f"backend = 'triton' takes {reason}; use {others!r} or 'auto'")
    if backend != "auto":
        return backend
    if q.is_cuda and triton_refuses(q, window, grid, top_k) is None:
        return "triton"
    # One query against a window of keys is a single dense row: blocks would only add padding.
    return others if q.shape[1] > 1 else "reference"


def _last_keys(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Leaves out the keys that not even the first query sees."""
    unseen = k.shape[1] - q.shape[1] - (window - 1)
    if unseen <= 0:
        return k, v, doc_start
    return k[:, unseen:], v[:, unseen:], None if doc_start is None else doc_start.clamp(min=unseen) - unseen


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sigma: Tensor,
    window: int | None,
    grid: Grid | None,
    top_k: int | None,
    doc_start: Tensor | None,
    dropout: float,
    seed: int | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; "
            "they must be [b, s, h, d] and twice [b, s_k, h_kv, d]"
        )
    b, s, h, d = q.shape
    b_k, s_k, h_kv, d_k = k.shape
    if b != b_k or d != d_k or s_k < s or s < 1 or h % h_kv:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} do not fit: "
            "same b and d, s_k >= s >= 1 and h a multiple of h_kv are needed"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must be of one floating dtype")
    tensors = {"q": q, "k": k, "v": v, "log_sigma": log_sigma, "doc_start": doc_start}
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{places}; they must be on one device")
    if log_sigma.shape not in ((h,), (1,)):
        raise ValueError(f"log_sigma {list(log_sigma.shape)}; it must be [{h}] (one a head) or [1]")
    if (window is None) == (grid is None):
        raise ValueError(f"window = {window}, grid = {grid}; give exactly one of them")
    if window is not None and window < 1:
        raise ValueError(f"window = {window}; it must be at least 1")
    if grid is not None and not s == s_k == grid.tokens:
        raise ValueError(f"s = {s}, s_k = {s_k}; {grid} needs {grid.tokens} of both")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}; it must be at least 1, or None for no selection")
    if doc_start is not None and (doc_start.shape != (b, s) or doc_start.dtype != torch.int32):
        raise ValueError(f"doc_start is {doc_start.dtype} {list(doc_start.shape)}; it must be int32 [{b}, {s}]")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout}; it must be at least 0 and below 1")
    if dropout > 0 and seed is None:
        raise ValueError(f"dropout = {dropout} needs a seed; give an integer")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed = {seed}; it must be at least 0 and below 2^63")

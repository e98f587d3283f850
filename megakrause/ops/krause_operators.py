"""Krause attention as `torch.library` operators, which autograd, `torch.compile` and fake tensors know. Behind them are
the backends that have a backward pass of their own: blocked and Triton. Definition: `ops/krause.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megakrause.ops import krause_backward, krause_forward
from megakrause.ops.grid import Grid
from megakrause.ops.krause_blocked import blocked_backward, blocked_forward, blocked_saved
from megakrause.ops.krause_launch import Launch

# A neighbourhood as operators can take it: [window], or what `Grid` has.
METRICS = ("manhattan", "chebyshev")


def neighbourhood(window: int | None, grid: Grid | None) -> list[int]:
    if grid is None:
        assert window is not None
        return [window]
    return [grid.height, grid.width, grid.radius, METRICS.index(grid.metric), int(grid.cls)]


def _launch(
    q: Tensor,
    k: Tensor,
    seen: list[int],
    top_k: int | None,
    doc_start: Tensor | None,
    dropout: float,
    seed: int,
    bias: bool,
) -> Launch:
    window, grid, size = seen[0], None, seen[0]
    if len(seen) > 1:
        height, width, radius, metric, cls = seen
        grid = Grid(height, width, radius, METRICS[metric], bool(cls))  # type: ignore[arg-type]
        size = grid.tokens
    return Launch.of(
        q,
        k,
        window=window if grid is None else None,
        grid=grid,
        top_k=None if top_k is None or top_k >= size else top_k,
        docs=doc_start is not None,
        dropout=dropout,
        seed=seed,
        bias=bias,
    )


@torch.library.custom_op("megakrause::krause_attention", mutates_args=())
def krause_attention_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sigma: Tensor,
    seen: list[int],
    top_k: int | None,
    doc_start: Tensor | None,
    dropout: float,
    seed: int,
    backend: str,
    bias: bool,
) -> tuple[Tensor, list[Tensor]]:
    """out [b, s, h, d], and what the backend's backward pass needs besides the inputs. bias: z = q.k - |k|^2 / 2, the
    definition; without it z = q.k, which is what windowed softmax attention needs."""
    # Autocast would compare z in bfloat16; Triton launches on the current device.
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        if backend == "blocked":
            out, saved = blocked_forward(
                q,
                k,
                v,
                log_sigma,
                window=seen[0],
                top_k=top_k,
                doc_start=doc_start,
                dropout=dropout,
                seed=seed,
                bias=bias,
            )
            return out, list(saved)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        log_sigma = log_sigma.expand(q.shape[2]).contiguous()
        doc_start = None if doc_start is None else doc_start.contiguous()
        launch = _launch(q, k, seen, top_k, doc_start, dropout, seed, bias)
        out, *for_backward = krause_forward.forward(launch, q, k, v, log_sigma, doc_start)
        return out, [x for x in for_backward if x is not None]


@krause_attention_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sigma: Tensor,
    seen: list[int],
    top_k: int | None,
    doc_start: Tensor | None,
    dropout: float,
    seed: int,
    backend: str,
    bias: bool,
) -> tuple[Tensor, list[Tensor]]:
    if backend == "blocked":
        return q.new_empty(q.shape), list(blocked_saved(q, k, seen[0], top_k))
    b, s_k, h_kv, _ = k.shape
    shapes = [q.shape[:3]] * 2 + [(b, h_kv, s_k)] * bias
    return q.new_empty(q.shape), [q.new_empty(shape, dtype=torch.float32) for shape in shapes]


@torch.library.custom_op("megakrause::krause_attention_backward", mutates_args=())
def krause_attention_backward_operator(
    grad: Tensor,
    saved: list[Tensor],
    log_sigma: Tensor,
    keys: list[int],
    seen: list[int],
    top_k: int | None,
    doc_start: Tensor | None,
    dropout: float,
    seed: int,
    backend: str,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_sigma. keys: the shape of k and v. saved: see `_setup_context`."""
    with torch.autocast(grad.device.type, enabled=False), torch.cuda.device_of(grad):
        if backend == "blocked":
            dq, dk, dv, row_sums = blocked_backward(
                grad,
                saved,
                log_sigma,
                keys=keys,
                window=seen[0],
                doc_start=doc_start,
                dropout=dropout,
                seed=seed,
                bias=bias,
            )
        else:
            q, k, v, out, lse, separator, *squares = (x.contiguous() for x in saved)
            sigmas = log_sigma.expand(q.shape[2]).contiguous()
            doc_start = None if doc_start is None else doc_start.contiguous()
            launch = _launch(q, k, seen, top_k, doc_start, dropout, seed, bias)
            results = out, lse, separator, squares[0] if bias else None
            dq, dk, dv, row_sums = krause_backward.backward(
                launch, grad.contiguous(), q, k, v, sigmas, doc_start, *results
            )
        dlog_sigma = row_sums.sum((0, 1)) if log_sigma.numel() > 1 else row_sums.sum().view(1)
        return dq, dk, dv, dlog_sigma.to(log_sigma.dtype)


@krause_attention_backward_operator.register_fake
def _(
    grad: Tensor, saved: list[Tensor], log_sigma: Tensor, keys: list[int], *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = grad.new_empty(grad.shape), grad.new_empty(keys), grad.new_empty(keys)
    return q, k, v, log_sigma.new_empty(log_sigma.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    q, k, v, log_sigma, seen, top_k, doc_start, dropout, seed, backend, bias = inputs
    out, saved = output
    # The blocked form lays q, k and v out anew, and needs neither them nor the result.
    ctx.save_for_backward(log_sigma, doc_start, *([] if backend == "blocked" else [q, k, v, out]), *saved)
    ctx.set_materialize_grads(False)  # zeros for each of `saved`
    ctx.settings = list(k.shape), seen, top_k, dropout, seed, backend, bias


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    log_sigma, doc_start, *saved = ctx.saved_tensors
    keys, seen, top_k, dropout, seed, backend, bias = ctx.settings
    gradients = krause_attention_backward_operator(
        grad, saved, log_sigma, keys, seen, top_k, doc_start, dropout, seed, backend, bias
    )
    return *gradients, *[None] * 7


krause_attention_operator.register_autograd(_backward, setup_context=_setup_context)

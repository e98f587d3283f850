"""`megakrause bench attention`: forward and backward of Krause attention against what it replaces."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from megakrause.bench.measure import machine, peak_memory, ratio, table, take_turns, write_json
from megakrause.errors import UserError
from megakrause.ops.krause import krause_attention

WINDOW, TOP_K, HEADS, HEAD_DIM, SIGMA = 128, 64, 4, 64, 2.5


def run(lengths: list[int], json_path: Path | None) -> None:
    """Checks, times, prints the table and writes it as JSON. Raises UserError when a check fails."""
    print(f"forward + backward, W {WINDOW}, k {TOP_K}, {HEADS} heads of {HEAD_DIM}, batch 1; {machine()}")
    check()
    rows = [measure(length) for length in tqdm(lengths, "measuring", unit="length", leave=False)]
    print(table(rows))
    print(
        "ms: medians. x: medians of ratios, round by round. published: the published layer's dense arithmetic. "
        "sdpa: torch's full causal softmax attention."
    )
    if json_path is not None:
        setting = {"window": WINDOW, "top_k": TOP_K, "heads": HEADS, "head_dim": HEAD_DIM, "machine": machine()}
        write_json(json_path, {"setting": setting, "rows": rows})


def published(q: Tensor, k: Tensor, v: Tensor, log_sigma: Tensor) -> Tensor:
    """The arithmetic of the published layer between its projections: dense distances, additive masks made anew, topk
    with gather and scatter (github.com/Jingkun-Liu/Krause-Synchronization-Transformers, autoregressive models)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # b h s d
    s = q.shape[2]
    distance = (q**2).sum(-1, keepdim=True) + (k**2).sum(-1, keepdim=True).mT - 2 * (q @ k.mT)
    scores = distance / (-2 * torch.exp(2 * log_sigma[:, None, None]))
    row, column = torch.arange(s, device=q.device)[:, None], torch.arange(s, device=q.device)
    for hidden in (column > row, column < row - WINDOW + 1):
        scores = scores + torch.zeros(s, s, device=q.device).masked_fill(hidden, -torch.inf)
    if s > TOP_K:
        index = scores.topk(TOP_K, dim=-1).indices
        scores = torch.full_like(scores, -torch.inf).scatter(-1, index, scores.gather(-1, index))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def krause(top_k: int | None) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, log_sigma: Tensor) -> Tensor:
        return krause_attention(q, k, v, log_sigma, window=WINDOW, top_k=top_k)

    return attend


def sdpa(q: Tensor, k: Tensor, v: Tensor, log_sigma: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def check() -> None:
    """Outputs and gradients of what is timed against the float64 reference, on inputs whose z is exact."""
    for name, attend, top_k in (("krause", krause(TOP_K), TOP_K), ("k >= W", krause(None), None)):
        inputs = make_inputs(3 * WINDOW + 5, exact=True)
        reference = partial(krause_attention, window=WINDOW, top_k=top_k, backend="reference")
        _compare(name, forward_backward(attend, inputs), forward_backward(reference, [x.double() for x in inputs]))
    # The published form keeps exactly k keys where scores tie, so its inputs are generic; and in float64, so that
    # rounding does not select other keys.
    inputs = [x.double() for x in make_inputs(3 * WINDOW + 5, exact=False)]
    reference = partial(krause_attention, window=WINDOW, top_k=TOP_K, backend="reference")
    _compare("published", forward_backward(published, inputs), forward_backward(reference, inputs))


def _compare(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        error = float((a - b).norm() / b.norm())
        if error > 1e-5:  # float32: sums of hundreds of terms, each good to 6e-8
            raise UserError(f"{name} differs from the reference by {error:.1e}; nothing was timed")


def measure(length: int) -> dict[str, Any]:
    """One row: times and ratios at one sequence length."""
    inputs = make_inputs(length, exact=False)
    contestants = {"krause": krause(TOP_K), "all keys": krause(None), "sdpa": sdpa}
    if length * length * HEADS * 4 * 12 < 8 * 2**30:  # the dense form holds about a dozen [h, s, s] at once
        contestants["published"] = published
    runs = {name: partial(forward_backward, attend, inputs) for name, attend in contestants.items()}
    seconds = take_turns(runs, rounds=5)
    memory = peak_memory(runs["krause"])
    dense = seconds.get("published")
    ms = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    return {
        "T": length,
        "krause ms": ms["krause"],
        "k >= W ms": ms["all keys"],
        "sdpa ms": ms["sdpa"],
        "published ms": ms.get("published"),
        "x published": None if dense is None else ratio(dense, seconds["krause"]),
        "x sdpa": ratio(seconds["sdpa"], seconds["krause"]),
        "krause MiB": None if memory is None else memory / 2**20,
    }


def make_inputs(length: int, exact: bool) -> list[Tensor]:
    """q, k, v [1, s, h, d] and log_sigma [h]. exact: multiples of 1/8, for which z is exact in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, HEADS, HEAD_DIM)
    qkv = [torch.randn(shape, generator=generator) for _ in range(3)]
    if exact:
        qkv = [(x * 8).round() / 8 for x in qkv]
    return [*(x.to(device) for x in qkv), torch.full((HEADS,), SIGMA).log().to(device)]


def forward_backward(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs that have one."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
    return [out.detach(), *(g for g in gradients if g is not None)]

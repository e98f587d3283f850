"""Inputs and cases that the tests of all implementations of Krause attention share.

Inputs lie on a grid of 1/8: z is then exact in every dtype here, so ties are exact and no rounding can change which
keys are kept. Shapes as in `megakrause/ops/krause.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from megakrause import krause_attention

NAMES = ("q", "k", "v", "log_sigma")
DEVICE = "cuda" if os.environ.get("MEGAKRAUSE_TEST_GPU") else "cpu"  # where the Triton kernels run
HALF = [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # Triton's interpreter multiplies bfloat16 wrong


def on_grid(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float64, spread: int = 12) -> Tensor:
    """Random multiples of 1/8 between -spread/8 and spread/8."""
    return (torch.randint(-spread, spread + 1, shape, generator=generator) / 8).to(dtype)


def inputs(
    b: int = 2, s: int = 40, heads: int = 2, kv_heads: int = 2, halo: int = 0, d: int = 4, sigmas: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, log_sigma in float64, the same for the same shapes."""
    generator = torch.Generator().manual_seed(s)
    q = on_grid(b, s, heads, d, generator=generator)
    k, v = (on_grid(b, s + halo, kv_heads, d, generator=generator) for _ in range(2))
    log_sigma = on_grid(sigmas or heads, generator=generator, spread=4) + 0.5
    return q, k, v, log_sigma


def run(tensors: tuple[Tensor, ...], dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
    """Output and every gradient, by name, for a fixed upstream gradient."""
    device = DEVICE if options.get("backend") == "triton" else "cpu"
    if options.get("doc_start") is not None:
        options["doc_start"] = options["doc_start"].to(device)
    leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
    out = krause_attention(*leaves, **options)
    upstream = on_grid(*out.shape, generator=torch.Generator().manual_seed(7), dtype=dtype).to(device)
    gradients = torch.autograd.grad(out, leaves, upstream)
    assert out.dtype == dtype and [g.dtype for g in gradients] == [dtype] * 4
    return {"out": out.detach().cpu()} | {name: g.cpu() for name, g in zip(NAMES, gradients, strict=True)}


def error(actual: Tensor, expected: Tensor, terms: int) -> float:
    """L2 error relative to what is expected or, where sums cancel, to that many terms of 1."""
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.norm() / max(terms**0.5, float(expected.detach().norm())))


@dataclass(frozen=True)
class Case:
    s: int
    window: int
    top_k: str
    heads: tuple[int, int]  # query heads, kv heads
    halo: str
    documents: str
    sigmas: str
    dropout: float
    d: int = 4  # head size

    def __str__(self) -> str:
        return "-".join(f"{f.name}={getattr(self, f.name)}".replace(" ", "_") for f in fields(self))

    def tensors(self) -> tuple[Tensor, ...]:
        heads, kv_heads = self.heads
        sigmas = 1 if self.sigmas == "one" else heads
        return inputs(2, self.s, heads, kv_heads, self.extra_keys, self.d, sigmas)

    @property
    def extra_keys(self) -> int:
        return {"none": 0, "W-1": self.window - 1, "less": (self.window - 1) // 2, "more": self.window + 6}[self.halo]

    def options(self) -> dict[str, Any]:
        kept = {"none": None, "1": 1, "3": 3, "W-1": max(1, self.window - 1), "W": self.window, "W+1": self.window + 1}
        return {
            "window": self.window,
            "top_k": kept[self.top_k],
            "doc_start": self.doc_start(),
            "dropout": self.dropout,
            "seed": 2**40 + 3 if self.dropout else None,
        }

    def doc_start(self) -> Tensor | None:
        if self.documents == "none":
            return None
        choose = random.Random(self.s)
        rows = [self.starts(choose) for _ in range(2)]
        doc_start = torch.tensor(rows, dtype=torch.int32)
        if self.documents == "empty rows":  # such as padding: the first key they may see lies behind them
            doc_start[0, ::3] = self.s + self.extra_keys
            doc_start[1] = torch.arange(1, self.s + 1) + self.extra_keys
        return doc_start

    def starts(self, choose: random.Random) -> list[int]:
        """Document starts on the key axis: the first may begin before the first key, or anywhere in the halo."""
        longest = 4 if self.documents == "short" else 2 * self.window
        starts: list[int] = []
        start = choose.randint(-2, self.extra_keys)
        while len(starts) < self.s:
            end = max(start + choose.randint(1, longest), self.extra_keys + len(starts) + 1)
            count = min(end - self.extra_keys, self.s) - len(starts)
            starts += [start] * count
            start = end
        return starts


def pairwise(
    values: dict[str, list[Any]], seed: int = 0, legal: Callable[[dict[str, Any]], bool] = lambda _: True
) -> list[dict[str, Any]]:
    """Legal settings in which any two values of any two names meet at least once, if they may; found greedily."""
    choose = random.Random(seed)
    missing = {
        pair for a, b in combinations(values, 2) for pair in product(*([(n, v) for v in values[n]] for n in (a, b)))
    }
    found = []
    while missing:
        must = dict(min(missing, key=str))  # a pair that nothing covers yet; the rest of the case is the best of many
        tries = [{n: choose.choice(v) for n, v in values.items()} | must for _ in range(60)]
        tries = list(filter(legal, tries)) or list(
            filter(legal, ({n: choose.choice(v) for n, v in values.items()} | must for _ in range(20_000)))
        )
        if not tries:  # these two do not go together
            missing.remove(tuple(must.items()))
            continue
        covered = [set(combinations(t.items(), 2)) & missing for t in tries]
        best = max(range(len(tries)), key=lambda i: len(covered[i]))
        missing -= covered[best]
        found.append(tries[best])
    return found

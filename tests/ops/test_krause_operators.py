"""Krause attention keeps the rules of torch.library, which autograd, torch.compile and fake tensors rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megakrause import Grid, krause_attention
from megakrause.ops.krause_operators import (
    krause_attention_backward_operator,
    krause_attention_operator,
    neighbourhood,
)
from tests.ops.cases import DEVICE, inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASES: dict[str, dict[str, Any]] = {
    "selection": dict(window=8, top_k=3),
    "whole window": dict(window=8),
    "documents, dropout": dict(window=8, top_k=3, doc_start=torch.full((2, 37), 5, dtype=torch.int32), dropout=0.1),
    "grid": dict(grid=Grid(6, 6), top_k=3),
}
BOTH = [
    (case, backend) for case in CASES for backend in ("blocked", "triton") if (case, backend) != ("grid", "blocked")
]


def tensors(backend: str) -> list[Tensor]:
    device = DEVICE if backend == "triton" else "cpu"
    return [x.to(device, torch.float32).requires_grad_() for x in inputs(2, 37, 4, 2, d=16)]


def options_of(case: str, backend: str) -> dict[str, Any]:
    options = dict(CASES[case])
    if backend == "triton" and "doc_start" in options:
        options["doc_start"] = options["doc_start"].to(DEVICE)
    return options


def operator_arguments(case: str, backend: str) -> tuple[Any, ...]:
    options = options_of(case, backend)
    seen = neighbourhood(options.get("window"), options.get("grid"))
    settings = options.get("top_k"), options.get("doc_start"), options.get("dropout", 0.0), 5
    return *tensors(backend), seen, *settings, backend, True


@pytest.mark.parametrize(
    "case, backend",
    [pytest.param(*x, marks=[pytest.mark.slow] if x[1] == "triton" else []) for x in BOTH],
)
def test_the_operators_keep_torch_librarys_rules(case: str, backend: str) -> None:
    arguments = operator_arguments(case, backend)
    torch.library.opcheck(krause_attention_operator, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    q, k, v, log_sigma, *settings = detached
    out, saved = krause_attention_operator(*detached)
    if backend == "triton":
        saved = [q, k, v, out, *saved]
    torch.library.opcheck(
        krause_attention_backward_operator, (torch.ones_like(out), saved, log_sigma, list(k.shape), *settings)
    )


@pytest.mark.parametrize(
    "case, backend",
    [
        pytest.param(*x, marks=[pytest.mark.slow] if x[1] == "triton" and x[0] != "selection" else [])
        for x in [*BOTH, ("selection", "auto"), ("selection", "reference"), ("grid", "auto")]
    ],
)
def test_compiled_as_one_graph_it_gives_the_same(case: str, backend: str) -> None:
    torch.compiler.reset()
    options = options_of(case, backend) | {"seed": 7, "backend": backend}

    def loss(*leaves: Tensor) -> Tensor:
        return krause_attention(*leaves, **options).square().sum()

    leaves = tensors(backend)
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    expected = [loss(*leaves), *torch.autograd.grad(loss(*leaves), leaves)]
    actual = [compiled(*leaves), *torch.autograd.grad(compiled(*leaves), leaves)]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_compiled_for_any_length_it_gives_the_same(backend: str) -> None:
    torch.compiler.reset()

    def attend(*leaves: Tensor) -> Tensor:
        return krause_attention(*leaves, window=8, top_k=3, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    device = DEVICE if backend == "triton" else "cpu"
    for s in (37, 50, 64):
        leaves = [x.to(device, torch.float32).requires_grad_() for x in inputs(1, s, 4, 2, d=16)]
        out, expected = compiled(*leaves), attend(*leaves)
        torch.testing.assert_close(out, expected)
        gradients = torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        for a, e in zip(*gradients, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_have_the_shape_and_dtype_of_real_ones(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        q, k = torch.empty(2, 37, 4, 16, dtype=dtype), torch.empty(2, 40, 2, 16, dtype=dtype)
        out = krause_attention(q, k, k, torch.empty(4), window=8, top_k=3, backend="blocked")
    assert (out.shape, out.dtype, out.stride()) == (q.shape, dtype, q.stride())


def test_second_derivatives_are_refused() -> None:
    leaves = tensors("blocked")
    out = krause_attention(*leaves, window=8, backend="blocked")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), leaves[1])

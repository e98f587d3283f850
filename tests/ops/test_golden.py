"""The attention layers of the published implementation: outputs and every gradient (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from megakrause import Grid, krause_attention
from tests.ops.cases import DEVICE

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-5  # relative L2 in float32, as the files' README says

CASES = [
    ("causal_attention", "reference"),
    ("causal_attention", "blocked"),
    ("causal_attention_no_topk", "reference"),
    ("causal_attention_no_topk", "blocked"),
    ("causal_attention", "triton"),
    ("causal_attention_no_topk", "triton"),
    ("grid_attention_cross", "reference"),
    ("grid_attention_block", "reference"),
    ("grid_attention_cross", "triton"),
    ("grid_attention_block", "triton"),
]


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def neighbourhood(hyper: dict[str, str]) -> dict[str, Any]:
    if "window" in hyper:
        return {"window": int(hyper["window"])}
    metric, radius = hyper["kind"].removeprefix("2-D neighbourhood: ").lower().split(" distance ")
    side = int(hyper["grid"])
    return {"grid": Grid(side, side, int(radius), metric, cls="cls_token" in hyper)}  # type: ignore[arg-type]


@pytest.mark.parametrize("name, backend", CASES)
def test_golden_attention_layer(name: str, backend: str) -> None:
    tensors, hyper = read(name)
    if backend == "triton":
        tensors = {key: t.to(DEVICE) for key, t in tensors.items()}
    heads = int(hyper["heads"])
    x = tensors["input"].requires_grad_()
    param = {key.removeprefix("param."): t.requires_grad_() for key, t in tensors.items() if key.startswith("param.")}

    def linear(layer: str, x: Tensor) -> Tensor:
        return F.linear(x, param[f"{layer}.weight"], param[f"{layer}.bias"])

    q, k, v = (linear(layer, x).unflatten(-1, (heads, -1)) for layer in ("W_q", "W_k", "W_v"))  # b s h d
    options: dict[str, Any] = {"top_k": int(hyper["top_k"]), "backend": backend} | neighbourhood(hyper)
    out = linear("out_proj", krause_attention(q, k, v, param["log_sigma"].view(-1), **options).flatten(-2))
    gradients = torch.autograd.grad(out, [x, *param.values()], tensors["output_grad"])

    actual = {"output": out, "input_grad": gradients[0]}
    actual |= {f"grad.{key}": g for key, g in zip(param, gradients[1:], strict=True)}
    assert set(actual) == {key for key in tensors if key.startswith(("output", "input_grad", "grad."))} - {
        "output_grad"
    }
    for key, value in actual.items():
        expected = tensors[key]
        assert value.shape == expected.shape
        assert (value - expected).norm() <= TOLERANCE * expected.norm(), key

"""The language model cut over tensor-parallel ranks: loss and every parameter's gradient are those of one process, in
float64, on sequences longer than two windows, with packed documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megakrause.config import ModelConfig
from megakrause.models.build import build_model
from megakrause.models.layout import Layout
from megakrause.ops.cross_entropy import cross_entropy_sum
from megakrause.parallel.linear import Shard, TensorParallel
from megakrause.parallel.mesh import Axis
from megakrause.parallel.vocab import vocab_parallel_cross_entropy_sum
from tests.ops.cases import pairwise
from tests.pool import Pool

WINDOW, LENGTH = 5, 23

SETTINGS: dict[str, list[Any]] = {
    "ranks": [1, 2, 4],
    "sequence_parallel": [False, True],
    "kv_heads": [4, 2, 1],
    "attention": ["krause", "softmax", "krause+softmax_window"],
    "tie_embeddings": [False, True],
    "positions": ["rope", "learned"],
    "qkv_bias": [False, True],
    "vocab_size": [32, 37],
    "documents": [False, True],
}


def model_config(kv_heads: int = 2, vocab_size: int = 37, **changes: Any) -> ModelConfig:
    return ModelConfig(
        layers=2,
        width=24,
        heads=4,
        head_dim=6,
        mlp_width=30,
        window=WINDOW,
        top_k=3,
        max_positions=LENGTH + 2,
        init_std=0.3,
        kv_heads=kv_heads,
        vocab_size=vocab_size,
        **changes,
    )


def batch(vocab_size: int, documents: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    tokens = torch.randint(vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    starts = torch.tensor([[0] * 9 + [9] * 1 + [10] * 13, [0] * 2 + [2] * 21], dtype=torch.int32)
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.8
    return tokens[:, :-1], tokens[:, 1:], mask, starts if documents else None


def gradients(axis: Axis, config: ModelConfig, documents: bool, sequence_parallel: bool) -> Any:
    """The loss, and (gradient, its place in the whole) of every parameter of this rank."""
    model = build_model(config, 0, Layout(TensorParallel(axis, sequence_parallel))).double()
    assert config.vocab_size is not None
    tokens, targets, mask, doc_start = batch(config.vocab_size, documents)
    logits = model(tokens, doc_start)
    loss = vocab_parallel_cross_entropy_sum(logits, targets, mask, axis, config.vocab_size)
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: (p.detach(), p.grad, getattr(p, "shard", None)) for n, p in named}


def whole(parts: list[Tensor], shards: list[Shard | None], name: str) -> Tensor:
    """A parameter from its shares; of one that every rank holds whole, all must be equal."""
    if shards[0] is None:
        for part in parts:
            torch.testing.assert_close(part, parts[0], rtol=1e-13, atol=1e-13, msg=name)
        return parts[0]
    dim, start = shards[0].dim, 0
    for part, shard in zip(parts, shards, strict=True):
        assert shard is not None and shard.start == start
        start += part.shape[dim]
    assert start == shards[0].total
    return torch.cat(parts, dim)


@pytest.mark.parametrize("case", [pytest.param(c, id="-".join(map(str, c.values()))) for c in pairwise(SETTINGS)])
def test_loss_and_every_gradient_equal_one_process(pool: Pool, case: dict[str, Any]) -> None:
    case = dict(case)
    ranks, sequence_parallel, documents = (case.pop(n) for n in ("ranks", "sequence_parallel", "documents"))
    case["attention"] = case["attention"].split("+") * (2 if "+" not in case["attention"] else 1)
    config = model_config(**case)
    model = build_model(config, 0).double()
    assert config.vocab_size is not None
    tokens, targets, mask, doc_start = batch(config.vocab_size, documents)
    expected = cross_entropy_sum(model(tokens, doc_start), targets, mask)
    expected.backward()

    results = pool.run(ranks, gradients, config, documents, sequence_parallel)
    for loss, _ in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    largest = max(float(param.grad.abs().max()) for param in model.parameters())
    for name, param in model.named_parameters():
        values, grads, shards = zip(*(found[name] for _, found in results), strict=True)
        assert torch.equal(whole(values, shards, name), param), f"initial {name}"
        assert param.grad is not None and param.grad.abs().max() > 0
        # Sums of some thousand terms in another order. (Those of a softmax layer's key bias cancel altogether.)
        bound = 1e-12 * max(float(param.grad.abs().max()), largest / 100)
        torch.testing.assert_close(whole(grads, shards, name), param.grad, rtol=0, atol=bound, msg=name)


def decode(axis: Axis, config: ModelConfig) -> Tensor:
    model = build_model(config, 0, Layout(TensorParallel(axis))).double()
    assert config.vocab_size is not None
    tokens = batch(config.vocab_size, False)[0]
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(tokens[:, :7], cache=cache)] + [
            model(tokens[:, i : i + 1], cache=cache) for i in range(7, LENGTH)
        ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_generation_with_a_cache_works_on_several_ranks(pool: Pool, kv_heads: int) -> None:
    config = model_config(kv_heads, attention=["krause", "softmax"])
    model, tokens = build_model(config, 0).double(), batch(37, False)[0]
    found = torch.cat(pool.run(4, decode, config), dim=-1)
    torch.testing.assert_close(found, model(tokens).detach(), rtol=1e-11, atol=1e-11)

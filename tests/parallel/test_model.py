"""The language model cut over tensor- and context-parallel ranks and into pipeline stages: loss and every parameter's
gradient are those of one process, in float64, on sequences longer than two windows, with packed documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megakrause.batch import TokenBatch
from megakrause.config import LoraConfig, ModelConfig
from megakrause.models.build import build_model
from megakrause.models.init import initialize, normal, whole_names
from megakrause.models.layout import Layout, Recompute
from megakrause.models.lm import LanguageModel
from megakrause.ops.cross_entropy import cross_entropy_sum
from megakrause.parallel.linear import Shard, TensorParallel
from megakrause.parallel.mesh import Axis, Mesh
from megakrause.parallel.vocab import vocab_parallel_cross_entropy_sum
from tests.ops.cases import pairwise
from tests.pool import Pool

LENGTH = 24
SEEDS = torch.tensor([5, (7 << 32) + 6])  # of dropout

SETTINGS: dict[str, list[Any]] = {
    "cp": [1, 2, 4],
    "tp": [1, 2, 4],
    "sequence_parallel": [False, True],
    "recompute": ["none", "selective", "full"],
    "kv_heads": [16, 8, 2, 1],
    "attention": ["krause", "softmax", "krause+softmax_window", "softmax+krause", "dual"],
    "window": [5, 9],  # of a rank's 6 positions with cp = 4: one neighbour, or two
    "tie_embeddings": [False, True],
    "positions": ["rope", "learned"],
    "qkv_bias": [False, True],
    "vocab_size": [32, 37],
    "documents": [False, True],
    "lora": [False, True],
    "style": ["llama", "gpt", "post"],
}
# LayerNorm, GELU, biases everywhere and dropout; and the same with its norms behind the sums.
GPT: dict[str, Any] = {"norm": "layer", "mlp": "gelu", "dropout": 0.2}
STYLES: dict[str, dict[str, Any]] = {"llama": {}, "gpt": GPT, "post": GPT | {"norm_placement": "post"}}


def model_config(
    kv_heads: int = 2,
    vocab_size: int = 37,
    window: int = 5,
    lora: bool = False,
    style: str = "llama",
    **changes: Any,
) -> ModelConfig:
    changes |= STYLES[style] | ({"bias": "dual" not in changes.get("attention", [])} if style != "llama" else {})
    if lora:
        targets = ["query", "key", "value", "output", "gate" if style == "llama" else "up", "down"]
        changes["lora"] = LoraConfig(rank=3, alpha=5.0, dropout=0.3, targets=targets)
    return ModelConfig(
        **dict(layers=2, width=24, heads=16, head_dim=6, mlp_width=30, top_k=3, max_positions=LENGTH + 2, init_std=0.3)
        | dict(kv_heads=kv_heads, vocab_size=vocab_size, window=window)
        | changes
    )


def batch(vocab_size: int, documents: bool) -> TokenBatch:
    tokens = torch.randint(vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    starts = torch.tensor([[0] * 9 + [9] * 1 + [10] * 14, [0] * 2 + [2] * 22], dtype=torch.int32)
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.8
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], mask, starts if documents else None)


def make_model(config: ModelConfig, layout: Layout | None = None) -> LanguageModel:
    """With adapters that add something, which new ones do not."""
    model = build_model(config, None, layout)
    for name, param in model.named_parameters():
        if name.endswith("adapter.b"):
            del param.initial_value
            normal(param, 0.3)
    initialize(model, 0)
    return model.double()


def gradients(mesh: Mesh, config: ModelConfig, documents: bool, sequence_parallel: bool, recompute: Recompute) -> Any:
    """The loss, and (value, gradient, its place in the whole) of every trained parameter of this rank."""
    layout = Layout(TensorParallel(mesh.tp, sequence_parallel), mesh.cp, recompute=recompute)
    model = make_model(config, layout)
    assert config.vocab_size is not None
    share = mesh.cp.share(LENGTH)
    mine = batch(config.vocab_size, documents).at(slice(share.start, share.stop))
    logits = model(mine.tokens, mine.doc_start, seeds=SEEDS)
    loss = vocab_parallel_cross_entropy_sum(logits, mine.targets, mine.loss_mask, mesh.tp, config.vocab_size)
    loss.backward()
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    for _, param in named:
        mesh.cp.sum(param.grad)
    assert all(param.grad is None for param in model.parameters() if not param.requires_grad)
    found = {n: (p.detach(), p.grad, getattr(p, "shard", None)) for n, p in named}
    return mesh.cp.sum(loss.detach()), found if mesh.cp.rank == 0 else None


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


def name_of(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values()))


CASES = pairwise(SETTINGS)


@pytest.mark.parametrize("case", [pytest.param(c, id=name_of(c)) for c in CASES if c["cp"] * c["tp"] <= 8])
def test_loss_and_every_gradient_equal_one_process(pool: Pool, case: dict[str, Any]) -> None:
    check_against_one_process(pool, **case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, id=name_of(c)) for c in CASES if c["cp"] * c["tp"] > 8])
def test_sixteen_ranks_equal_one_process(pool_of_16: Pool, case: dict[str, Any]) -> None:
    check_against_one_process(pool_of_16, **case)


def check_against_one_process(
    pool: Pool,
    cp: int,
    tp: int,
    sequence_parallel: bool,
    recompute: Recompute,
    documents: bool,
    attention: str,
    **settings: Any,
) -> None:
    kinds = attention.split("+")
    config = model_config(attention=kinds * (2 // len(kinds)), **settings)
    model = make_model(config)
    assert config.vocab_size is not None
    given = batch(config.vocab_size, documents)
    logits = model(given.tokens, given.doc_start, seeds=SEEDS)
    if config.has_dropout:
        assert (logits - model(given.tokens, given.doc_start)).abs().max() > 0.1
    expected = cross_entropy_sum(logits, given.targets, given.loss_mask)
    expected.backward()

    results = pool.run_mesh((1, 1, cp, tp), gradients, config, documents, sequence_parallel, recompute)
    for loss, _ in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert (len(trained) < len(list(model.parameters()))) == (config.lora is not None)
    largest = max(float(param.grad.abs().max()) for param in trained.values())
    for name, param in trained.items():
        values, grads, shards = zip(*(found[name] for _, found in results[:tp]), strict=True)
        assert torch.equal(whole(values, shards, name), param), f"initial {name}"
        assert param.grad is not None and param.grad.abs().max() > 0
        # Sums of some thousand terms in another order. (Those of a softmax layer's key bias cancel altogether.)
        bound = 1e-12 * max(float(param.grad.abs().max()), largest / 100)
        torch.testing.assert_close(whole(grads, shards, name), param.grad, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stages", [[1, 3], [2, 1, 1], [1, 1, 1, 1]])
def test_pipeline_stages_one_after_the_other_are_the_model(stages: list[int], tied: bool) -> None:
    config = model_config(layers=4, tie_embeddings=tied)
    given = batch(37, True)
    model = build_model(config, 0).double()
    expected = cross_entropy_sum(model(given.tokens, given.doc_start), given.targets, given.loss_mask)
    expected.backward()

    ranges = tuple(range(sum(stages[:i]), sum(stages[: i + 1])) for i in range(len(stages)))
    parts = [
        build_model(config, 0, Layout(pp=Axis(i, len(stages), None), stages=ranges)).double()
        for i in range(len(stages))
    ]
    x = given.tokens
    for part in parts:
        x = part(x, given.doc_start, length=LENGTH)
    loss = cross_entropy_sum(x, given.targets, given.loss_mask)
    loss.backward()
    assert torch.equal(loss, expected)
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, param in whole_names(part).items():
            assert param.grad is not None
            found[name] = found[name] + param.grad if name in found else param.grad
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name], param.grad, rtol=1e-12, atol=1e-14, msg=name)
    owned = [n for part in parts for n, p in whole_names(part).items() if part.layout.owns(p)]
    assert sorted(owned) == sorted(found)


def decode(axis: Axis, config: ModelConfig) -> Tensor:
    model = build_model(config, 0, Layout(TensorParallel(axis))).double()
    assert config.vocab_size is not None
    tokens = batch(config.vocab_size, False).tokens
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(tokens[:, :7], cache=cache)] + [
            model(tokens[:, i : i + 1], cache=cache) for i in range(7, LENGTH)
        ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kv_heads", [1, 8])
def test_generation_with_a_cache_works_on_several_ranks(pool: Pool, kv_heads: int) -> None:
    config = model_config(kv_heads, attention=["krause", "softmax"])
    model, tokens = build_model(config, 0).double(), batch(37, False).tokens
    found = torch.cat(pool.run(4, decode, config), dim=-1)
    torch.testing.assert_close(found, model(tokens).detach(), rtol=1e-11, atol=1e-11)

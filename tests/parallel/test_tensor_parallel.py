"""Layers cut over several ranks equal whole ones: outputs and every gradient, in float64.

Each function runs on every rank of the pool. `whole` puts the ranks' shares together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakrause.ops.cross_entropy import cross_entropy_sum
from megakrause.parallel.collectives import collect, copy, gather, reduce, reduce_scatter, scatter
from megakrause.parallel.linear import ColumnParallelLinear, RowParallelLinear, Shard, TensorParallel
from megakrause.parallel.mesh import Axis
from megakrause.parallel.vocab import VocabParallelEmbedding, vocab_parallel_cross_entropy_sum
from tests.pool import Pool

SIZES = [1, 2, 3, 4]
EXACT = dict(rtol=1e-12, atol=1e-13)  # sums of at most some hundred terms near 1, in another order


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    share = axis.share(x.shape[dim])
    return x.narrow(dim, share.start, len(share)).clone()


# ---- shares


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("total", [0, 1, 7, 8, 50257])
def test_shares_are_even_and_complete(total: int, size: int) -> None:
    shares = [Axis(rank, size, None).share(total) for rank in range(size)]
    assert [n for share in shares for n in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Axis(0, size, None).share(total, size - 1) == shares[-1]


# ---- collectives


def each_collective(axis: Axis, total: int, dim: int) -> dict[str, Any]:
    """Every collective's result and gradient, where the input and the upstream gradient depend on the rank."""
    shape, cut = [2, 3, 4], [2, 3, 4]
    shape[dim], cut[dim] = total, len(axis.share(total))
    functions = {
        "copy": (lambda x: copy(x, axis), shape),
        "reduce": (lambda x: reduce(x, axis), shape),
        "gather": (lambda x: gather(x, axis, dim, total), cut),
        "reduce_scatter": (lambda x: reduce_scatter(x, axis, dim), shape),
        "scatter": (lambda x: scatter(x, axis, dim), shape),
        "collect": (lambda x: collect(x, axis, dim, total), cut),
    }
    found: dict[str, Any] = {}
    for number, (name, (function, size)) in enumerate(functions.items()):
        x = random(*size, seed=100 * number + axis.rank).transpose(0, 2).contiguous().transpose(0, 2)
        before = x.clone()
        x.requires_grad_()
        out = function(x)
        upstream = random(*out.shape, seed=100 * number + 50 + axis.rank)
        (grad,) = torch.autograd.grad(out, x, upstream)
        assert torch.equal(x, before)
        found[name] = x.detach(), out.detach(), upstream, grad
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("total", [8, 5, 2])
def test_collectives_are_what_their_table_says(pool: Pool, size: int, dim: int, total: int) -> None:
    ranks = pool.run(size, each_collective, total, dim)
    axes = [Axis(rank, size, None) for rank in range(size)]
    for name in ranks[0]:
        xs, outs, upstreams, grads = zip(*(rank[name] for rank in ranks), strict=True)
        for axis, x, out, upstream, grad in zip(axes, xs, outs, upstreams, grads, strict=True):
            match name:
                case "copy":
                    expected = x, sum(upstreams)
                case "reduce":
                    expected = sum(xs), upstream
                case "gather":
                    expected = torch.cat(xs, dim), part(sum(upstreams), axis, dim)
                case "reduce_scatter":
                    expected = part(sum(xs), axis, dim), torch.cat(upstreams, dim)
                case "scatter":
                    expected = part(x, axis, dim), torch.cat(upstreams, dim)
                case "collect":
                    expected = torch.cat(xs, dim), part(upstream, axis, dim)
            torch.testing.assert_close((out, grad), expected, **EXACT)


# ---- a region between a column-parallel and a row-parallel layer


def gated_mlp(axis: Axis, sequence_parallel: bool, features: int) -> dict[str, Tensor]:
    """A column-parallel layer with bias, an elementwise function of all features, a row-parallel layer."""
    x, norm = random(2, 7, 6, seed=0), random(6, seed=1).requires_grad_()
    up = ColumnParallelLinear(6, features, axis, bias=True).double()
    down = RowParallelLinear(features, 6, axis).double()
    with torch.no_grad():
        up.weight.copy_(part(random(features, 6, seed=2), axis, 0))
        up.bias.copy_(part(random(features, seed=3), axis, 0))
        down.weight.copy_(part(random(6, features, seed=4), axis, 1))
    if axis.size > 1:
        assert down.weight.shard == Shard(1, axis.share(features).start, features)
    x.requires_grad_()
    tp = TensorParallel(axis, sequence_parallel)
    here = scatter(x, axis, 1) if sequence_parallel else x
    y = here * tp.whole(norm)
    y = here + tp.leave(down(F.silu(up(tp.enter(y, x.shape[1])))))
    if sequence_parallel:
        y = gather_without_sum(y, axis, x.shape[1])
    loss = (y * random(2, 7, 6, seed=5)).sum()
    gradients = torch.autograd.grad(loss, [x, norm, up.weight, up.bias, down.weight])
    names = ("x", "norm", "up", "bias", "down")
    return {"out": y.detach()} | dict(zip(names, gradients, strict=True))


def gather_without_sum(x: Tensor, axis: Axis, length: int) -> Tensor:
    """The whole sequence, of which every rank makes the same use: its gradient is not to be added up `axis.size` times.
    Each rank's own part keeps its gradient, the others' are constants."""
    whole = gather(x.detach(), axis, 1, length)
    share = axis.share(length)
    return torch.cat([whole[:, : share.start], x, whole[:, share.stop :]], dim=1)


@pytest.mark.parametrize("features", [12, 14])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_tensor_parallel_region_equals_whole_layers(
    pool: Pool, size: int, sequence_parallel: bool, features: int
) -> None:
    x, norm, weight, bias, down = leaves = [
        random(2, 7, 6, seed=0),
        random(6, seed=1),
        random(features, 6, seed=2),
        random(features, seed=3),
        random(6, features, seed=4),
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    out = x + F.linear(F.silu(F.linear(x * norm, weight, bias)), down)
    gradients = torch.autograd.grad((out * random(2, 7, 6, seed=5)).sum(), leaves)

    ranks = pool.run(size, gated_mlp, sequence_parallel, features)
    for rank in ranks:
        torch.testing.assert_close(rank["out"], out.detach(), **EXACT)
        torch.testing.assert_close(rank["x"], gradients[0], **EXACT)
        torch.testing.assert_close(rank["norm"], gradients[1], **EXACT)
    for name, dim, expected in [("up", 0, gradients[2]), ("bias", 0, gradients[3]), ("down", 1, gradients[4])]:
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks], dim), expected, **EXACT)


# ---- the vocabulary


def embed_and_score(axis: Axis, vocab_size: int, tied: bool, scale: float, sequence_parallel: bool) -> dict[str, Any]:
    tokens = torch.randint(vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    targets, mask = tokens.roll(1, 1), torch.tensor([[True] * 6, [False, True] * 3])
    embedding = VocabParallelEmbedding(vocab_size, 5, axis).double()
    with torch.no_grad():
        embedding.weight.copy_(part(random(vocab_size, 5, seed=1), axis, 0))
    output = embedding.weight if tied else part(random(vocab_size, 5, seed=2), axis, 0).requires_grad_()
    tp = TensorParallel(axis, sequence_parallel)
    x = tp.leave(embedding(tokens))
    logits = F.linear(tp.enter(scale * torch.tanh(x), tokens.shape[1]), output)
    loss = vocab_parallel_cross_entropy_sum(logits, targets, mask, axis, vocab_size)
    wanted = [embedding.weight] if tied else [embedding.weight, output]
    return {"loss": loss.detach(), "gradients": torch.autograd.grad(loss * 0.3, wanted)}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    "vocab_size, tied, scale", [(12, True, 1.0), (11, False, 1.0), (4, True, 1.0), (13, False, 300)]
)
@pytest.mark.parametrize("size", SIZES)
def test_a_vocabulary_in_parts_equals_a_whole_one(
    pool: Pool, size: int, vocab_size: int, tied: bool, scale: float, sequence_parallel: bool
) -> None:
    tokens = torch.randint(vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    targets, mask = tokens.roll(1, 1), torch.tensor([[True] * 6, [False, True] * 3])
    weight = random(vocab_size, 5, seed=1).requires_grad_()
    output = weight if tied else random(vocab_size, 5, seed=2).requires_grad_()
    logits = F.linear(scale * torch.tanh(F.embedding(tokens, weight)), output)
    expected = F.cross_entropy(logits[mask], targets[mask], reduction="sum")
    gradients = torch.autograd.grad(0.3 * expected, [weight] if tied else [weight, output], retain_graph=True)

    ranks = pool.run(size, embed_and_score, vocab_size, tied, scale, sequence_parallel)
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], expected.detach(), **EXACT)
    for number, gradient in enumerate(gradients):
        found = torch.cat([rank["gradients"][number] for rank in ranks])
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-12 * scale)
    torch.testing.assert_close(cross_entropy_sum(logits, targets, mask), expected, **EXACT)


def test_a_failing_rank_is_named(pool: Pool) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2:[\s\S]*ZeroDivisionError"):
        pool.run(2, fail_on_the_last)
    assert pool.run(2, fail_on_the_last, 1) == [0, 1]


def fail_on_the_last(axis: Axis, divisor: int = 0) -> int:
    return axis.rank if axis.rank == 0 else axis.rank // divisor

"""Sequences cut over several ranks: what each sees of the others, and that gradients go back there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megakrause.parallel.context import heads_for_positions, positions_for_heads, with_halo
from megakrause.parallel.mesh import Axis
from tests.pool import Pool


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halo(axis: Axis, length: int, width: int) -> tuple[Any, int]:
    """Two tensors with their halos, their gradients, the upstream gradients, and the bytes sent forwards."""
    xs = [random(2, length, 3, seed=10 * axis.rank + i).requires_grad_() for i in range(2)]
    before = axis.traffic.bytes
    outs = with_halo(axis, width, *xs)
    sent = axis.traffic.bytes - before
    ups = [random(*out.shape, seed=1000 + 10 * axis.rank + i) for i, out in enumerate(outs)]
    grads = torch.autograd.grad(outs, xs, ups)
    return [[x.detach() for x in group] for group in (xs, outs, ups, grads)], sent


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("width", [0, 1, 3, 5, 7, 100])
def test_a_halo_is_what_comes_before_and_its_gradient_goes_back(pool: Pool, size: int, length: int, width: int) -> None:
    results = [result for result, _ in pool.run(size, halo, length, width)]
    for which in range(2):
        xs, outs, ups, grads = zip(*([group[which] for group in result] for result in results), strict=True)
        whole, expected = torch.cat(xs, 1), torch.zeros(2, size * length, 3, dtype=torch.float64)
        for rank in range(size):
            first = max(0, rank * length - width)
            assert torch.equal(outs[rank], whole[:, first : (rank + 1) * length])
            expected[:, first : (rank + 1) * length] += ups[rank]
        torch.testing.assert_close(torch.cat(grads, 1), expected, rtol=1e-14, atol=1e-14)


def test_bytes_of_a_halo_depend_on_neither_the_length_nor_the_ranks(pool: Pool) -> None:
    sent = {max(sent for _, sent in pool.run(size, halo, length, 3)) for size in (2, 4, 8) for length in (3, 8, 50)}
    assert sent == {2 * 2 * 3 * 3 * 8}  # tensors, sequences, positions, numbers of a position, bytes


def exchange(axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    x = random(2, 12, 8, 3, seed=0)
    mine = x[:, axis.rank * 12 // axis.size : (axis.rank + 1) * 12 // axis.size].clone().requires_grad_()
    heads = heads_for_positions(mine, axis)
    back = positions_for_heads(heads * random(2, 12, 8, 3, seed=1).chunk(axis.size, 2)[axis.rank], axis)
    (grad,) = torch.autograd.grad(back, mine, random(2, 12, 8, 3, seed=2).chunk(axis.size, 1)[axis.rank])
    return heads.detach(), back.detach(), grad


@pytest.mark.parametrize("size", [1, 2, 4])
def test_heads_are_exchanged_for_positions_and_back(pool: Pool, size: int) -> None:
    x, factor, up = (random(2, 12, 8, 3, seed=seed) for seed in range(3))
    heads, back, grad = zip(*pool.run(size, exchange), strict=True)
    assert torch.equal(torch.cat(heads, 2), x)
    assert torch.equal(torch.cat(back, 1), x * factor)
    assert torch.equal(torch.cat(grad, 1), up * factor)

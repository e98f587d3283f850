"""Dropout of features: a function of its arguments alone, by torch and by the kernel, that drops evenly."""

from __future__ import annotations

import pytest
import torch

from megakrause.ops.feature_dropout import Noise, by_kernel, by_torch, kept
from tests.ops.cases import DEVICE, HALF

SEEDS = torch.tensor([0, 1, 2**40 + 7, 2**62])


def keys_of(b: int, s: int) -> torch.Tensor:
    return torch.randint(2**32, (b, s), generator=torch.Generator().manual_seed(b * s))


@pytest.mark.parametrize("dropout", [0.3, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 63), (3, 5, 1024), (1, 3, 2500)], ids=str)
@pytest.mark.parametrize("first", [0, 4096])
def test_the_kernel_gives_the_same_bits(
    shape: tuple[int, int, int], first: int, dtype: torch.dtype, dropout: float
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    keys = keys_of(*shape[:2]).to(DEVICE)
    assert torch.equal(by_kernel(x, keys, first, dropout), by_torch(x, keys, first, dropout))


def test_what_stays_is_scaled_and_its_gradient_too() -> None:
    x = torch.randn(4, 9, 50, dtype=torch.float64, requires_grad=True)
    y = Noise(SEEDS, 3).drop(x, layer=5, first=0, dropout=0.25)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    dropped = y == 0
    assert 0.2 < float(dropped.double().mean()) < 0.3
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.75)
    torch.testing.assert_close(x.grad, (~dropped).double() / 0.75)


def test_parts_are_dropped_as_the_whole() -> None:
    """By sequences, positions and features, as ranks share them."""
    x = torch.ones(4, 12, 30)
    whole = Noise(SEEDS, 0).drop(x, 9, 0, 0.5)
    for rows in (slice(0, 1), slice(1, 4)):
        for positions in (slice(0, 5), slice(5, 12)):
            for features in (slice(0, 11), slice(11, 30)):
                part = Noise(SEEDS[rows], positions.start).drop(x[rows, positions, features], 9, features.start, 0.5)
                assert torch.equal(part, whole[rows, positions, features])


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_drops_are_even_and_independent(dropout: float) -> None:
    """Within five standard deviations: in all, in each column and row, and together with every neighbour."""
    x = torch.ones(8, 200, 500)
    seeds = torch.arange(8)  # neighbours, as sequences of a run have them
    dropped = (Noise(seeds, 0).drop(x, 1, 0, dropout) == 0).double()
    spread = (dropout * (1 - dropout)) ** 0.5

    def check(values: torch.Tensor, expected: float, count: int, spread: float) -> None:
        assert float((values - expected).abs().max()) < 5 * spread / count**0.5

    check(dropped.mean(), dropout, dropped.numel(), spread)
    for dim in range(3):
        others = [d for d in range(3) if d != dim]
        check(dropped.mean(others), dropout, dropped.numel() // dropped.shape[dim], spread)
    centred = (dropped - dropout) / spread
    for dim in range(3):
        for distance in (1, 2, 3, 64, 128):
            if distance < x.shape[dim]:
                a = centred.narrow(dim, 0, x.shape[dim] - distance)
                b = centred.narrow(dim, distance, x.shape[dim] - distance)
                check((a * b).mean(), 0.0, a.numel(), 1.0)
    other = (Noise(seeds, 0).drop(x, 2, 0, dropout) == 0).double()
    check((centred * (other - dropout) / spread).mean(), 0.0, x.numel(), 1.0)
    assert not torch.equal(Noise(seeds + 8, 0).drop(x, 1, 0, dropout) == 0, dropped.bool())


def test_all_of_a_threshold() -> None:
    assert kept(keys_of(2, 50), 0, 100, 0.0).all()


def test_whole_sequences_are_left_out_evenly_and_wherever_they_stand() -> None:
    seeds = torch.arange(20000)
    x = torch.ones(20000, 2, 3, dtype=torch.float64, requires_grad=True)
    y = Noise(seeds, 0).drop_sequences(x, 7, 0.2)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y)
    assert set(y.unique().tolist()) == {0.0, 1.25} and bool((y == y[:, :1, :1]).all())
    assert abs(float((y[:, 0, 0] == 0).double().mean()) - 0.2) < 5 * (0.2 * 0.8 / 20000) ** 0.5
    part = slice(100, 150)
    assert torch.equal(Noise(seeds[part], 9).drop_sequences(x[part], 7, 0.2), y[part])
    assert not torch.equal(Noise(seeds, 0).drop_sequences(x, 8, 0.2), y)

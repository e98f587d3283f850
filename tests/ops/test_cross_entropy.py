"""The summed cross entropy, which computes its gradient in the memory of the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megakrause.ops import cross_entropy
from megakrause.ops.cross_entropy import cross_entropy_sum


def make(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(11, (3, 7), generator=generator)
    return logits.to(dtype), targets, torch.rand(3, 7, generator=generator) < 0.6


def reference(logits: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.double().requires_grad_()
    loss = -torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0][mask].sum()
    return loss.detach(), torch.autograd.grad(loss * 3, logits)[0]


@pytest.mark.parametrize("at_once", [1, 25, 10**6])  # rows one by one, in uneven parts, all together
@pytest.mark.parametrize("scale", [1.0, 300.0])  # at 300 most probabilities underflow in float32
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradient(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float, at_once: int) -> None:
    monkeypatch.setitem(cross_entropy.ELEMENTS_AT_ONCE, "cpu", at_once)
    logits, targets, mask = make(dtype, scale)
    expected, expected_gradient = reference(logits, targets, mask)
    leaf = logits.requires_grad_()
    loss = cross_entropy_sum(leaf.clone(), targets, mask)
    (gradient,) = torch.autograd.grad(loss * 3, leaf)

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == compute and gradient.dtype == dtype
    # A sum of 21 terms; a gradient is one exponential, rounded to its dtype and once more when it is scaled. The
    # exponent itself is a difference of logits, which float32 knows to within their size.
    eps = torch.finfo(compute).eps
    torch.testing.assert_close(loss.double(), expected, rtol=21 * eps, atol=0)
    bound = 4 * torch.finfo(dtype).eps + 4 * eps * scale
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=bound, atol=3 * bound)
    assert not gradient[~mask].any()


def test_without_gradient_the_logits_stay_as_they_are() -> None:
    logits, targets, mask = make(torch.float32)
    before = logits.clone()
    loss = cross_entropy_sum(logits, targets, mask)
    torch.testing.assert_close(loss.double(), reference(before, targets, mask)[0], rtol=21 * 1.2e-7, atol=0)
    assert torch.equal(logits, before)


def test_nothing_to_learn_is_zero() -> None:
    logits, targets, _ = make(torch.float32)
    leaf = logits.requires_grad_()
    loss = cross_entropy_sum(leaf.clone(), targets, torch.zeros(3, 7, dtype=torch.bool))
    assert loss == 0 and not torch.autograd.grad(loss, leaf)[0].any()


def test_bfloat16_logits_are_summed_in_float32() -> None:
    """2,000 tokens of log(4) each: a sum in bf16 would stop growing at 512."""
    logits, targets = torch.zeros(2, 1000, 4, dtype=torch.bfloat16), torch.zeros(2, 1000, dtype=torch.int64)
    loss = cross_entropy_sum(logits, targets, torch.ones_like(targets, dtype=torch.bool))
    assert abs(float(loss) / (2000 * torch.tensor(4.0).log().item()) - 1) < 1e-5


def test_logits_that_are_no_plain_memory_are_refused() -> None:
    logits, targets, mask = make(torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        cross_entropy_sum(logits.mT.contiguous().mT, targets, mask)

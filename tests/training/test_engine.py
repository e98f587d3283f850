"""One optimizer step: what it averages over, and what it does with a gradient that is not finite."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from megakrause.batch import TokenBatch
from megakrause.config import RunConfig
from megakrause.config.file import load_config
from megakrause.models.build import build_model
from megakrause.parallel.mesh import Mesh
from megakrause.training.engine import Engine
from megakrause.training.optimizer import build_optimizer

VOCABULARY = 50
STAGES = list(itertools.product(range(4), ("fp32", "bf16")))


def make_config(path: Path, *overrides: str) -> RunConfig:
    return load_config(path, [f"model.vocab_size={VOCABULARY}", *overrides])


def make_batch(seed: int = 0) -> TokenBatch:
    """Four sequences; masks hide almost all of some of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (4, 49), generator=generator)
    mask = torch.rand(4, 48, generator=generator) < torch.tensor([[0.02], [0.9], [0.3], [1.0]])
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], mask, torch.zeros(4, 48, dtype=torch.int32))


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {f.name: f.tensor.clone() for f in engine.fragments() if f.kind == "master"}


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_step_is_plain_adamw_on_the_mean_over_tokens(config: Path, micro_batch: int) -> None:
    run = make_config(config, f"train.micro_batch={micro_batch}", "optim.clip=0.1")
    engine, plain = Engine(build_model(run.model, 0), run, Mesh.start()), build_model(run.model, 0)
    optimizer = build_optimizer(plain, run.optim)
    for step in range(3):
        batch = make_batch(step)
        result = engine.train_step(batch, lr=1e-2)

        optimizer.zero_grad()
        logits = plain(batch.tokens, batch.doc_start)
        loss = cross_entropy(logits[batch.loss_mask], batch.targets[batch.loss_mask])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
        optimizer.step()

        # Sums of about 1e2 terms in another order: float32 rounding, as torch's own comparison allows.
        torch.testing.assert_close(result.loss, loss.item(), rtol=1.3e-6, atol=0)
        torch.testing.assert_close(result.grad_norm, norm.item(), rtol=1e-5, atol=0)
        assert result.tokens == int(batch.loss_mask.sum()) and result.applied
    expected = dict(plain.named_parameters())
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, expected[name].detach().flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("zero", "precision"), STAGES)
def test_a_gradient_that_is_not_finite_changes_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch, zero: int, precision: str
) -> None:
    run = make_config(config, f"parallel.zero={zero}", f"train.precision={precision}", "train.micro_batch=2")
    engine = Engine(build_model(run.model, 0), run, Mesh.start())
    assert engine.train_step(make_batch(), 1e-2).applied
    before = {(f.name, f.kind): f.tensor.clone() for f in engine.fragments()}
    loss_sum = engine._loss_sum
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_loss_sum", lambda *given: loss_sum(*given) * float("nan"))
        result = engine.train_step(make_batch(), 1e-2)
    assert not result.applied and engine.optimizer_steps == 1
    after = {(f.name, f.kind): f.tensor for f in engine.fragments()}
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert engine.train_step(make_batch(), 1e-2).applied

"""The learning rate."""

from __future__ import annotations

import pytest

from megakrause.config import OptimConfig
from megakrause.training.schedule import learning_rate


def rates(steps: int, **options: object) -> list[float]:
    config = OptimConfig(lr=1.0, **options)  # type: ignore[arg-type]
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_cosine() -> None:
    got = rates(8, warmup=2, min_lr=0.2)
    assert got[:3] == [0.5, 1.0, 1.0]
    assert got[5] == pytest.approx(0.6)  # half of the way down
    assert all(a > b for a, b in zip(got[2:], got[3:], strict=False)) and got[-1] > 0.2


def test_warmup_stable_decay() -> None:
    assert rates(10, schedule="wsd", warmup=2, decay=4) == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates(20, schedule="wsd")[-3:] == [1, 1, 0.5]  # a tenth of the run


def test_constant() -> None:
    assert rates(4, schedule="constant", warmup=4) == [0.25, 0.5, 0.75, 1]


def test_warmup_into_the_decay_has_no_jump() -> None:
    got = rates(10, schedule="wsd", warmup=8, decay=5)
    assert max(abs(a - b) for a, b in zip(got, got[1:], strict=False)) <= 0.25


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_every_step_learns(schedule: str) -> None:
    assert min(rates(5, schedule=schedule, warmup=2)) > 0

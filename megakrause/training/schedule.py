"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megakrause.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 .. steps - 1: linear warm-up, then cosine, or constant with a linear decay at the end
    (warmup-stable-decay, Hu et al., arXiv 2404.06395), or constant. The decays would reach min_lr at step `steps`."""
    if config.schedule == "cosine":
        share = (step - config.warmup) / max(1, steps - config.warmup)
        height = (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2
    elif config.schedule == "wsd":
        height = min(1.0, (steps - step) / (config.decay or max(1, steps // 10)))
    else:
        height = 1.0
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return warm * (config.min_lr + (config.lr - config.min_lr) * height)

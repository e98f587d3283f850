"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megakrause.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 .. steps - 1: linear warm-up, then cosine to min_lr, or constant with a linear decay
    to min_lr at the end (warmup-stable-decay, Hu et al., arXiv 2404.06395), or constant."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "cosine":
        share = (step - config.warmup) / max(1, steps - 1 - config.warmup)
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, share))) / 2
    if config.schedule == "wsd":
        decay = config.decay or max(1, steps // 10)
        share = min(1.0, (steps - step) / (decay + 1))
        return config.min_lr + (config.lr - config.min_lr) * share
    return config.lr

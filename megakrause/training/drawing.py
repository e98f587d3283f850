"""Images that an image model in training draws, for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from megakrause.config import RunConfig
from megakrause.data.images import ImageSamples
from megakrause.models.pictures import draw, grid, upper_half
from megakrause.training.engine import Engine

SCALE = 4  # pixels of a picture for one of an image


def pictures(engine: Engine, valid: ImageSamples, config: RunConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 [h, w, c]): images of the model's own, and below held-out ones what it makes of their upper halves.
    All ranks call it alike. None where the model is cut into stages or positions."""
    count = min(config.log.samples, len(valid))
    real = valid.pixels(np.arange(count))
    first = torch.from_numpy(real.reshape(count, -1)[:, :1].astype(np.int64))
    for name, known in ("eval/samples", first), ("eval/completions", upper_half(real)):
        if (step := engine.drawing()) is None:
            return
        drawn = draw(step, config.model, known.to(engine.mesh.device), seed=config.train.seed)
        both = name == "eval/completions"
        yield name, grid(np.concatenate([real, drawn]) if both else drawn, count if both else None, SCALE)

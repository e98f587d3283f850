"""Images that a model draws, and grids of them to look at."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megakrause.config import ModelConfig
from megakrause.models.sample import Step, continued

GAP = 1  # pixels between the images of a grid


@torch.no_grad()
def draw(
    step: Step,
    config: ModelConfig,
    known: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Images, uint8 [b, height, width, c], that begin with the values `known`, int64 [b, n], in raster order, channels
    last. step: of the model with an empty cache. progress: is called for every value."""
    wanted = math.prod(config.image_shape) - known.shape[1]
    values = [known]
    for value in islice(continued(step, known, temperature=temperature, top_p=top_p, seed=seed), wanted):
        values.append(value[:, None])
        progress()
    return torch.cat(values, 1).to(torch.uint8).cpu().numpy().reshape(-1, *config.image_shape)


def upper_half(images: np.ndarray) -> Tensor:
    """The values of the upper halves of images, uint8 [b, height, width, c], as `draw` takes them."""
    return torch.from_numpy(images[:, : images.shape[1] // 2].reshape(len(images), -1).astype(np.int64))


def grid(images: np.ndarray, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """Images, uint8 [n, height, width, c], side by side and below one another, uint8 [h, w, c]; each pixel `scale`
    pixels wide."""
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    whole = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 128, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        whole[top : top + height, left : left + width] = image
    return whole.repeat(scale, 0).repeat(scale, 1)


def to_png(image: np.ndarray) -> Image.Image:
    """uint8 [h, w, 1 or 3]."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)

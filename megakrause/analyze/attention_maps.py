"""Where the layers of a vision transformer look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from megakrause.models.attention import GridKrauseCore
from megakrause.models.vit import VisionTransformer
from megakrause.ops.krause_reference import krause_weights


@torch.no_grad()
def attention_weights(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Of each layer, [b, h, s, s]: the share that a query (row) takes of each key. images: as the model takes them."""
    found: list[Tensor] = []

    def look(core: nn.Module, arguments: tuple[Any, ...]) -> None:
        q, k = arguments[:2]  # b s h d
        if isinstance(core, GridKrauseCore):
            log_sigma = core.log_sigma.expand(q.shape[2])
            found.append(krause_weights(q, k, log_sigma, window=None, grid=core.grid, top_k=core.top_k))
        else:
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
            found.append(scores.softmax(-1))

    hooks = [block.attention.core.register_forward_pre_hook(look) for block in model.layers]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def draw_maps(path: Path, pixels: np.ndarray, models: dict[str, tuple[VisionTransformer, Tensor]]) -> None:
    """A picture: under each image, what its central patch sees in every layer of each model, the mean of the heads.

    pixels: uint8 [b, height, width, c]. models: by a name, with the images as it takes them."""
    layers = max(len(model.layers) for model, _ in models.values())
    columns, rows = 1 + layers, len(pixels) * len(models)
    figure = Figure(figsize=(1.4 * columns, 1.5 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for number, (name, (model, images)) in enumerate(models.items()):
        height, width = model.config.patches
        first = int(model.config.pooling == "cls")
        centre = first + height // 2 * width + width // 2
        weights = attention_weights(model, images)
        for row, image in enumerate(pixels):
            line = axes[row * len(models) + number]
            line[0].imshow(image[..., 0] if image.shape[2] == 1 else image, cmap="gray")
            line[0].set_ylabel(name, fontsize=9)
            for layer, p in enumerate(weights):
                line[1 + layer].imshow(p[row, :, centre, first:].mean(0).view(height, width), cmap="viridis", vmin=0)
                line[1 + layer].set_title(f"layer {layer}", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path)

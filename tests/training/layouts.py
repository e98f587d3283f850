"""Runs one config in several ZeRO stages, in this process of however many torchrun started, and the yardstick of their
differences: the same run from initial weights that differ by one unit in the last place.

    torchrun --nproc_per_node=2 tests/training/layouts.py CONFIG OUTPUT stages PRECISION
    python tests/training/layouts.py CONFIG OUTPUT ulp PRECISION
    python tests/training/layouts.py CONFIG OUTPUT resume PRECISION
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch

from megakrause.config import load_config
from megakrause.parallel.mesh import Mesh
from megakrause.training.loop import Trainer


class Moved:
    """The weights of a model, each moved to a neighbouring float."""

    def __init__(self, weights: dict[str, torch.Tensor], move: Callable[[torch.Tensor], torch.Tensor]):
        self.weights = {name: torch.nextafter(w, move(w)).flatten().float() for name, w in weights.items()}

    def read(self, name: str, kind: str, offset: int, numel: int) -> torch.Tensor:
        return self.weights[name][offset : offset + numel]


def main(config_path: str, output: str, what: str, precision: str) -> None:
    mesh = Mesh.start()

    def build(name: str, zero: int) -> Trainer:
        overrides = [f"output={output}/{name}", f"parallel.zero={zero}", f"train.precision={precision}"]
        # No clipping, which would hide a wrong scale; accumulation; a checkpoint to go on from elsewhere.
        overrides += ["optim.clip=0", "train.micro_batch=1", "checkpoint.every=3"]
        return Trainer(load_config(config_path, overrides), mesh)

    if what == "stages":
        for zero in range(4):
            build(f"zero{zero}", zero).run()
        return
    if what == "resume":  # in this layout, what another layout has begun
        build("resumed", 0).run()
        return
    build("one", 0).run()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32  # that the model computes in
    generator = torch.Generator().manual_seed(0)
    moves: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "up": lambda w: torch.full_like(w, math.inf),
        "down": lambda w: torch.full_like(w, -math.inf),
        "either": lambda w: torch.where(torch.rand(w.shape, generator=generator) < 0.5, math.inf, -math.inf),
    }
    for name, move in moves.items():
        trainer = build(name, 0)
        masters = (f for f in trainer.engine.fragments() if f.kind == "master")
        weights = {f.name: f.tensor.view(f.shape).to(dtype, copy=True) for f in masters}
        trainer.engine.load(Moved(weights, move), weights_only=True)  # type: ignore[arg-type]
        trainer.run()


if __name__ == "__main__":
    main(*sys.argv[1:])

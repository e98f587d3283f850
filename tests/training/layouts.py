"""Runs one config in several layouts, one after the other, in this process of however many torchrun started; and the
yardstick of their differences: the same run from initial weights that differ by one unit in the last place.

    torchrun --nproc_per_node=4 tests/training/layouts.py CONFIG OUTPUT NAME:key=value;key=value ...
    python tests/training/layouts.py CONFIG OUTPUT NAME:key=value;ulp ...
    python tests/training/layouts.py CONFIG OUTPUT NAME:key=value;resave=CHECKPOINTS ...

NAME's run is in OUTPUT/NAME. With `ulp`, the runs with moved weights are in OUTPUT/NAME-up and so on. With `resave`, it
goes on from the newest of a folder of checkpoints and saves at once, without a step, to OUTPUT/NAME/checkpoints.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megakrause.checkpoint.place import Place
from megakrause.config.file import load_config
from megakrause.parallel.mesh import Mesh
from megakrause.training.loop import Trainer

# No clipping, which would hide a wrong scale, unless a layout says otherwise.
COMMON = ["optim.clip=0", "checkpoint.every=2"]
MOVED = ("up", "down", "either")


class Moved:
    """The weights of a model, each moved to a neighbouring float."""

    def __init__(self, weights: dict[str, torch.Tensor], move: Callable[[torch.Tensor], torch.Tensor]):
        self.weights = {name: torch.nextafter(w, move(w)).flatten().float() for name, w in weights.items()}
        self.shapes = {name: w.shape for name, w in weights.items()}

    def read(self, name: str, kind: str, offset: int, numel: int, box: object, out: object) -> torch.Tensor:
        return self.weights[name][offset : offset + numel]


def moves() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        "up": lambda w: torch.full_like(w, math.inf),
        "down": lambda w: torch.full_like(w, -math.inf),
        "either": lambda w: torch.where(torch.rand(w.shape, generator=generator) < 0.5, math.inf, -math.inf),
    }


def run(config_path: str, output: str, layout: str) -> None:
    name, _, settings = layout.partition(":")
    words = [*filter(None, settings.split(";"))]
    yardstick = "ulp" in words
    source = next((word.removeprefix("resave=") for word in words if word.startswith("resave=")), None)
    overrides = COMMON + [word for word in words if word != "ulp" and not word.startswith("resave=")]
    if source is not None:
        overrides.append(f"checkpoint.folder={source}")

    @contextmanager
    def build(folder: str) -> Iterator[Trainer]:
        config = load_config(config_path, [*overrides, f"output={output}/{folder}"])
        trainer = Trainer(config, Mesh.start(config.parallel))
        yield trainer
        trainer.close()

    with build(name) as trainer:
        if source is None:
            trainer.run()
        else:
            trainer.saver.place = Place.of(f"{output}/{name}/checkpoints")
            trainer.save()
    for kind, move in moves().items() if yardstick else ():
        with build(f"{name}-{kind}") as trainer:
            # What the model computes in, where one unit in the last place is larger.
            dtype = torch.bfloat16 if trainer.config.train.precision == "bf16" else torch.float32
            masters = (f for f in trainer.engine.fragments() if f.kind == "master")
            weights = {f.name: f.tensor.view(f.shape).to(dtype, copy=True) for f in masters}
            trainer.engine.load_weights(Moved(weights, move))  # type: ignore[arg-type]
            trainer.run()


if __name__ == "__main__":
    for each in sys.argv[3:]:
        run(sys.argv[1], sys.argv[2], each)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of so many process groups may abort while the interpreter takes them down

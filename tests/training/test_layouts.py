"""Any number of ranks and any ZeRO stage gives the losses, gradient norms and weights of one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.runs import rows, state

SCRIPT = Path(__file__).with_name("layouts.py")
MOVED = ("up", "down", "either")


def run(launcher: list[str], *arguments: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [*launcher, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def curve(output: Path, key: str) -> Tensor:
    return torch.tensor([row[key] for row in rows(output)], dtype=torch.float64)


def weights(output: Path) -> dict[str, Tensor]:
    return {name: tensor for (name, kind), tensor in state(output).items() if kind == "master"}


class Yardstick:
    """Twice what changes when the initial weights move by one unit in the last place: of a curve, up to each step; of
    each parameter."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.one = weights(folder / "one")
        moved = [weights(folder / name) for name in MOVED]
        self.weight_bounds = {
            name: 2 * max(float((m[name] - w).abs().max()) for m in moved) for name, w in self.one.items()
        }

    def bounds(self, key: str) -> Tensor:
        one = curve(self.folder / "one", key)
        changes = torch.stack([(curve(self.folder / name, key) - one).abs() for name in MOVED])
        return 2 * changes.amax(0).cummax(0).values

    def check(self, output: Path) -> None:
        for key in ("loss", "grad_norm"):
            bounds, one = self.bounds(key), curve(self.folder / "one", key)
            assert (bounds < 0.1 * one).all(), "the yardstick itself is broken"
            change = (curve(output, key) - one).abs()
            assert (change <= bounds).all(), (output.name, key, change, bounds)
        for name, weight in weights(output).items():
            change = float((weight - self.one[name]).abs().max())
            assert change <= self.weight_bounds[name], (output.name, name, change, self.weight_bounds[name])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_two_ranks_with_every_zero_stage_equal_one_process(config: Path, tmp_path: Path, precision: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    run(torchrun, config, tmp_path, "stages", precision)
    run([sys.executable], config, tmp_path, "ulp", precision)
    yardstick = Yardstick(tmp_path)
    for zero in range(4):
        yardstick.check(tmp_path / f"zero{zero}")

    # Begun by two ranks with ZeRO 3, gone on with by one without.
    shutil.copytree(tmp_path / "zero3", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-6")
    run([sys.executable], config, tmp_path, "resume", precision)
    assert [row["step"] for row in rows(tmp_path / "resumed")] == [1, 2, 3, 4, 5, 6]
    yardstick.check(tmp_path / "resumed")

"""Any number of ranks and any ZeRO stage gives the losses and weights of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.runs import losses, state

SCRIPT = Path(__file__).with_name("layouts.py")
MOVED = ("up", "down", "either")


def run(launcher: list[str], *arguments: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [*launcher, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_two_ranks_with_every_zero_stage_equal_one_process(config: Path, tmp_path: Path, precision: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    run(torchrun, config, tmp_path, "stages", precision)
    run([sys.executable], config, tmp_path, "ulp", precision)

    one, one_state = torch.tensor(losses(tmp_path / "one")), state(tmp_path / "one")
    weights = [key for key in one_state if key[1] == "master"]
    loss_bound = 2 * max((torch.tensor(losses(tmp_path / name)) - one).abs().max() for name in MOVED)
    moved = [state(tmp_path / name) for name in MOVED]
    weight_bound = 2 * max((m[key] - one_state[key]).abs().max() for m in moved for key in weights)
    assert 0 < loss_bound < 0.1 and 0 < weight_bound < 0.1, "the yardstick itself is broken"

    for zero in range(4):
        got, got_state = torch.tensor(losses(tmp_path / f"zero{zero}")), state(tmp_path / f"zero{zero}")
        assert (got - one).abs().max() <= loss_bound, zero
        for key in weights:
            assert (got_state[key] - one_state[key]).abs().max() <= weight_bound, (zero, key)

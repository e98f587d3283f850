"""Nothing may be compiled when a run starts, whatever the ZeRO stage and offload."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

# One training step of each kind that an engine can be asked for, in one process.
ONE_STEP_EACH = """
import torch
from megakrause.training.extensions import prepare_extensions

prepare_extensions()
prepare_extensions()

import deepspeed

torch.distributed.init_process_group("gloo", init_method="file://" + STORE, rank=0, world_size=1)
deepspeed.init_distributed("gloo")
for stage, offload in [(0, False), (1, True), (2, True), (3, True)]:
    zero = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    model = torch.nn.Linear(4, 4)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    print("trained at stage", stage)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A CPU process without a working compiler, whose extensions would land in an empty folder."""
    broken = dict(CXX="/nonexistent/c++", CC="/nonexistent/cc", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    rank = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    return os.environ | broken | rank | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}


def test_training_compiles_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    # A lock left by a killed build: a process that wanted the extension would wait for ever.
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()

    script = f"STORE = {str(tmp_path / 'store')!r}\n" + ONE_STEP_EACH
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("trained")] == [
        f"trained at stage {stage}" for stage in range(4)
    ]
    left = [path for path in (tmp_path / "extensions").rglob("*") if path.is_file()]
    assert left == [lock]

"""A checkpoint that cannot be written ends all ranks together, or, if so told, is tried again; what was there stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megakrause.checkpoint.read import Checkpoint
from tests import disks
from tests.disks import needs_root
from tests.training.runs import losses, rows, start_script, state, train

pytestmark = pytest.mark.faults

SLOW_STEPS = """
from megakrause.training import engine
real_step = engine.Engine.train_step
def train_step(self, batch, lr):
    time.sleep(0.25)
    return real_step(self, batch, lr)
engine.Engine.train_step = train_step
"""
EVERY = ("train.steps=12", "checkpoint.every=4", "checkpoint.keep=9", "parallel.zero=1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for three checkpoints of half a megabyte."""
    with disks.small_disk(tmp_path / "disk", "1900k") as folder:
        yield folder


def when_step_4_is_there(process: subprocess.Popen[str], checkpoints: Path, break_it: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not (checkpoints / "step-4").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(0.1)  # its writer is done
    break_it()


def saved(checkpoints: Path) -> list[str]:
    """What is there beside the lock."""
    return sorted(path.name for path in checkpoints.iterdir() if path.name != ".lock")


def fill(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


def read_only(folder: Path) -> None:
    """By a mount on top of it, since the one below has files that are open for writing."""
    for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]):
        subprocess.run(command, check=True)


@needs_root
@pytest.mark.parametrize("asynchronous", ["false", pytest.param("true", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (fill, "No space left on device"),
        pytest.param(lambda disk: shutil.rmtree(disk / "here"), "No such file or directory", marks=pytest.mark.slow),
    ],
)
def test_all_ranks_end_together(
    config: Path, tmp_path: Path, small_disk: Path, break_it: Callable[[Path], object], said: str, asynchronous: str
) -> None:
    checkpoints = small_disk / "here" / "checkpoints"
    overrides = (*EVERY, f"checkpoint.folder={checkpoints}", f"checkpoint.asynchronous={asynchronous}")
    process = start_script(config, *overrides, ranks=2, prelude=SLOW_STEPS)
    when_step_4_is_there(process, checkpoints, lambda: break_it(small_disk))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "step 8 could not be saved" in lines[0] and said in lines[0], printed
    assert len(rows(tmp_path / "run")) < 12
    if checkpoints.exists():
        assert saved(checkpoints) == ["step-4"] and Checkpoint(checkpoints / "step-4").verify() is None


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_if_told_so_training_goes_on_and_saves_when_there_is_room(
    config: Path, tmp_path: Path, small_disk: Path, asynchronous: str
) -> None:
    checkpoints = small_disk / "checkpoints"
    overrides = (*EVERY, f"checkpoint.folder={checkpoints}", f"checkpoint.asynchronous={asynchronous}")
    process = start_script(config, *overrides, "checkpoint.on_failure=continue", ranks=2, prelude=SLOW_STEPS)
    when_step_4_is_there(process, checkpoints, lambda: fill(small_disk))
    assert process.stdout is not None
    for line in process.stdout:
        if "step 8 could not be saved" in line:
            assert "No space left on device; training goes on" in line
            break
    (small_disk / "filler").unlink()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert saved(checkpoints) == ["step-12", "step-4"]
    undisturbed = tmp_path / "undisturbed"
    train(config, *EVERY, f"output={undisturbed}", "parallel.zero=0")
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), rel=1e-5)
    assert Checkpoint(checkpoints / "step-12").verify() is None


@needs_root
def test_a_log_that_cannot_be_written_does_not_end_the_run(config: Path, tmp_path: Path, small_disk: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    # So many rows do not fit into the pages that the file has when the disk becomes full.
    overrides = ("train.steps=40", "checkpoint.every=4", f"checkpoint.folder={checkpoints}", "checkpoint.keep=9")
    process = start_script(config, *overrides, f"output={small_disk}/run", prelude=SLOW_STEPS)
    when_step_4_is_there(process, checkpoints, lambda: fill(small_disk))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    said = f"cannot write {small_disk}/run/metrics.jsonl: No space left on device; training goes on without"
    assert printed.count(said) == 1 and {"step-8", "step-40"} <= set(saved(checkpoints))


@needs_root
@pytest.mark.slow
def test_the_last_checkpoint_must_be_written(config: Path, small_disk: Path) -> None:
    overrides = ("train.steps=8", "checkpoint.every=4", f"checkpoint.folder={small_disk}/checkpoints")
    told = ("checkpoint.asynchronous=true", "checkpoint.on_failure=continue")
    process = start_script(config, *overrides, *told, prelude=SLOW_STEPS)
    when_step_4_is_there(process, small_disk / "checkpoints", lambda: fill(small_disk))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "error: step 8 could not be saved: " in printed, printed
    assert saved(small_disk / "checkpoints") == ["step-4"]


@needs_root
@pytest.mark.slow
def test_a_folder_that_became_read_only(config: Path, small_disk: Path) -> None:
    checkpoints = small_disk / "checkpoints"
    process = start_script(config, *EVERY, "parallel.zero=0", f"checkpoint.folder={checkpoints}", prelude=SLOW_STEPS)
    when_step_4_is_there(process, checkpoints, lambda: read_only(small_disk))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Read-only file system" in printed, printed
    assert saved(checkpoints) == ["step-4"] and Checkpoint(checkpoints / "step-4").verify() is None


def test_an_output_that_is_removed_ends_the_run(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start_script(config, *EVERY, "parallel.zero=0", prelude=SLOW_STEPS)
    when_step_4_is_there(process, output / "checkpoints", lambda: shutil.rmtree(output))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    assert "error: step 8 could not be saved: " in printed and "No such file or directory" in printed
    assert not output.exists()


@pytest.mark.slow
def test_checkpoints_elsewhere_are_found_again(config: Path, tmp_path: Path) -> None:
    """By a URL that fsspec writes: killed and resumed, it is bitwise the undisturbed run."""
    output, elsewhere = tmp_path / "run", f"file://{tmp_path}/elsewhere"
    train(config, "train.steps=4", "optim.schedule=constant", f"checkpoint.folder={elsewhere}")
    (tmp_path / "elsewhere" / "step-6").mkdir()
    (tmp_path / "elsewhere" / "step-6" / "rank-00000.safetensors").write_bytes(b"cut short")
    printed = train(config, "train.steps=8", "optim.schedule=constant", f"checkpoint.folder={elsewhere}")
    assert f"resuming from {elsewhere}/step-4" in printed
    assert sorted(os.listdir(tmp_path / "elsewhere")) == [".lock", "step-4", "step-8"]
    undisturbed = tmp_path / "undisturbed"
    train(config, "train.steps=8", "optim.schedule=constant", f"output={undisturbed}")
    assert losses(output) == losses(undisturbed)
    ours, theirs = state(output), state(undisturbed)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not (output / "checkpoints").exists()

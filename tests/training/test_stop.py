"""Asked to end early, a run saves, on all ranks at the same step, and goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from megakrause.checkpoint.read import Checkpoint
from tests.training.runs import losses, rows, start_script, state, train

pytestmark = pytest.mark.faults

ENDLESS = ("train.steps=100000", "optim.schedule=constant")
SAVED = 75  # exit status
# On the ranks in SLOW, every file of a checkpoint takes so many seconds longer to reach the disk.
SLOW_DISK = """
fsync = os.fsync
def slow(descriptor):
    if "checkpoints/" in os.readlink(f"/proc/self/fd/{descriptor}") and os.environ.get("RANK", "0") in %r:
        time.sleep(%s)
    fsync(descriptor)
os.fsync = slow
"""


def wait_until(process: subprocess.Popen[str], condition: object) -> None:
    deadline = time.monotonic() + 180
    while not condition():  # type: ignore[operator]
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def has_steps(output: Path, count: int) -> bool:
    return (output / "metrics.jsonl").exists() and len(rows(output)) >= count


def is_saving(output: Path) -> bool:
    return any((output / "checkpoints").glob("step-*.tmp"))


def rank_processes(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """In order of rank."""
    children = psutil.Process(launcher.pid).children()
    return sorted((c for c in children if "script.py" in " ".join(c.cmdline())), key=lambda c: int(c.environ()["RANK"]))


def saved_step(output: Path) -> int:
    """Of the only checkpoint, which is whole."""
    (folder,) = (output / "checkpoints").iterdir()
    assert Checkpoint(folder).verify() is None
    return int(folder.name.removeprefix("step-"))


def assert_goes_on_as_if_never_stopped(config: Path, output: Path, *overrides: str) -> None:
    steps = saved_step(output) + 3
    assert "resuming from" in train(config, f"output={output}", *ENDLESS, *overrides, f"train.steps={steps}")
    undisturbed = output.with_name("undisturbed")
    train(config, f"output={undisturbed}", *ENDLESS, f"train.steps={steps}")
    assert losses(output) == losses(undisturbed)
    ours, theirs = state(output), state(undisturbed)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("number", "override"),
    [
        (signal.SIGTERM, "checkpoint.asynchronous=false"),
        pytest.param(signal.SIGINT, "checkpoint.asynchronous=true", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "checkpoint.every=7", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(
    config: Path, tmp_path: Path, number: signal.Signals, override: str
) -> None:
    output = tmp_path / "run"
    process = start_script(config, *ENDLESS, override, "checkpoint.keep=1")
    wait_until(process, lambda: has_steps(output, 5))
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == SAVED, printed
    step = saved_step(output)
    assert len(rows(output)) == step
    assert f"stopped: {number.name} received; saved at step {step} of 100000; the same command goes on" in printed
    assert_goes_on_as_if_never_stopped(config, output, override)


def test_a_signal_in_the_last_step_saves_as_if_there_were_none(config: Path, tmp_path: Path) -> None:
    prelude = """
from megakrause.training import engine
real_step, calls = engine.Engine.train_step, []
def train_step(self, batch, lr):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), 15)
    return real_step(self, batch, lr)
engine.Engine.train_step = train_step
"""
    process = start_script(config, "train.steps=6", prelude=prelude)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped: " not in printed, printed
    assert saved_step(tmp_path / "run") == 6


def test_the_time_limit_saves_and_ends(config: Path, tmp_path: Path) -> None:
    process = start_script(config, *ENDLESS, "train.time_limit=0.05")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == SAVED and "stopped: train.time_limit is over; saved at step" in printed, printed
    assert saved_step(tmp_path / "run") == len(rows(tmp_path / "run"))


@pytest.mark.parametrize(
    ("override", "asked"),
    [
        ("parallel.zero=2", [1]),
        pytest.param("parallel.tp=2", [0], marks=pytest.mark.slow),
        pytest.param("parallel.pp=2", [0, 1], marks=pytest.mark.slow),
    ],
)
def test_one_rank_asked_is_all_ranks_asked(config: Path, tmp_path: Path, override: str, asked: list[int]) -> None:
    output = tmp_path / "run"
    launcher = start_script(config, *ENDLESS, override, ranks=2)
    wait_until(launcher, lambda: has_steps(output, 5))
    processes = rank_processes(launcher)
    for rank in asked:
        processes[rank].send_signal(signal.SIGTERM)
    printed, _ = launcher.communicate(timeout=90)
    assert printed.count("stopped: SIGTERM received; saved at step") == 1, printed
    assert "exitcode  : 75" in printed and "error: " not in printed, printed
    assert saved_step(output) == len(rows(output))


@pytest.mark.parametrize("asynchronous", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_signal_during_a_save_waits_for_it(config: Path, tmp_path: Path, asynchronous: str) -> None:
    output = tmp_path / "run"
    overrides = (*ENDLESS, "checkpoint.every=5", "checkpoint.keep=9", f"checkpoint.asynchronous={asynchronous}")
    process = start_script(config, *overrides, prelude=SLOW_DISK % (["0"], 0.3))
    wait_until(process, lambda: is_saving(output))
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == SAVED, printed
    folders = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert "step-5" in folders and all(Checkpoint(output / "checkpoints" / name).verify() is None for name in folders)
    assert f"step-{len(rows(output))}" in folders


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_loses_nothing_saved(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(config, "train.steps=4", "optim.schedule=constant")
    process = start_script(config, *ENDLESS, prelude=SLOW_DISK % (["0"], 100))
    wait_until(process, lambda: has_steps(output, 8))
    process.send_signal(signal.SIGTERM)
    wait_until(process, lambda: is_saving(output))
    process.send_signal(signal.SIGTERM)  # one that a launcher hands on, too, is no second request
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM and "ended at once, without saving" in printed
    assert Checkpoint(output / "checkpoints" / "step-4").verify() is None
    assert "resuming from" in train(config, "train.steps=6", "optim.schedule=constant")


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_ranks_wait_for_one_that_is_slow_at_saving(config: Path, tmp_path: Path, asynchronous: str) -> None:
    """Asynchronously, they train meanwhile."""
    output = tmp_path / "run"
    settings = ("train.steps=12", "checkpoint.every=4", "parallel.zero=1", f"checkpoint.asynchronous={asynchronous}")
    launcher = start_script(config, *settings, "checkpoint.keep=9", ranks=2, prelude=SLOW_DISK % (["1"], 2))
    wait_until(launcher, lambda: is_saving(output))
    steps = 0
    while (output / "checkpoints" / "step-4.tmp").exists():
        steps = len(rows(output))
    assert (steps > 4) == (asynchronous == "true")
    printed, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, printed
    assert sorted(os.listdir(output / "checkpoints")) == ["step-12", "step-4", "step-8"]
    assert all(Checkpoint(path).verify() is None for path in (output / "checkpoints").iterdir())

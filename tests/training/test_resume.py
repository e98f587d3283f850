"""Resume equals never having stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
import torch

from tests.training.runs import kill_when, losses, rows, start, state, train
from tests.training.test_layouts import config_here, run

pytestmark = pytest.mark.faults

__all__ = ["config_here"]  # a fixture

LIMIT = 300  # seconds for whatever is waited for


class Job:
    """`megakrause train`: one process, or a launcher with its ranks."""

    def __init__(self, config: Path, *overrides: object, ranks: int = 1):
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
        self.config = str(config)
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "megakrause", "train", self.config, *map(str, overrides)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self) -> list[psutil.Process]:
        """All that are alive, the launcher first, also ranks whose launcher is gone."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if self.config in process.cmdline():
                    found.append(process)
        return sorted(found, key=lambda process: process.pid != self.process.pid)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that comes while the job runs."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._fail("it ended, or took too long")
            time.sleep(0.002)

    def kill(self, victims: Iterable[psutil.Process] | None = None) -> str:
        """kill -9 of all, or of some, upon which the others have to end by themselves. Returns what they printed."""
        for process in self.processes() if victims is None else victims:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return self._ended()

    def finish(self) -> str:
        """What it printed, after it came to a good end."""
        printed = self._ended()
        assert self.process.returncode == 0, printed
        return printed

    def _ended(self) -> str:
        try:
            return self.process.communicate(timeout=LIMIT)[0]  # up to the last process that could print
        except subprocess.TimeoutExpired:
            self._fail(f"{len(self.processes())} processes did not end")

    def _fail(self, why: str) -> NoReturn:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        raise AssertionError(f"{why}: {self.process.communicate()[0]}")


def last_step(output: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0: there is none."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def assert_bitwise_same(ours: Path, theirs: Path) -> None:
    """Of two runs, every step and the newest checkpoint."""
    keys = ("step", "loss", "grad_norm", "lr", "tokens")
    for row, other in zip(rows(ours), rows(theirs), strict=True):
        assert [row[key] for key in keys] == [other[key] for key in keys]
    weights, others = state(ours), state(theirs)
    assert weights.keys() == others.keys()
    for key in weights:
        assert torch.equal(weights[key].view(torch.int32), others[key].view(torch.int32)), key


ASYNCHRONOUS, BF16, ACCUMULATED = "checkpoint.asynchronous=true", "train.precision=bf16", "train.micro_batch=1"
LAYOUTS: dict[int, dict[str, list[str]]] = {  # by ranks
    1: {"one": [], "one-half": [BF16, ACCUMULATED, ASYNCHRONOUS]},
    2: {
        "zero0": [ASYNCHRONOUS],
        "zero1": ["parallel.zero=1", BF16],
        "zero2": ["parallel.zero=2", ACCUMULATED, ASYNCHRONOUS],
        "zero3": ["parallel.zero=3", ASYNCHRONOUS],
        "zero3-half": ["parallel.zero=3", BF16],
        "pp": ["parallel.pp=2", "train.micro_batch=2"],
        "pp-zero1": ["parallel.pp=2", "parallel.zero=1", BF16, ASYNCHRONOUS],
        "tp": ["parallel.tp=2"],
    },
}


class Undisturbed:
    """Runs that saved only at their end, those of as many processes in the same ones."""

    def __init__(self, folder: Path, config: Path):
        self.folder, self.config = folder, config

    def output(self, ranks: int, name: str) -> Path:
        if not (self.folder / name).exists():
            keys = {n: ";".join([*keys, *COMMON, "checkpoint.every=0"]) for n, keys in LAYOUTS[ranks].items()}
            run(ranks, self.config, self.folder, *(f"{n}:{k}" for n, k in keys.items()))
        return self.folder / name


COMMON = ["train.steps=60", "optim.clip=0.5", "log.tensorboard=false"]


@pytest.fixture(scope="session")
def undisturbed_runs(config_here: Path) -> Undisturbed:
    return Undisturbed(config_here.parent / "undisturbed", config_here)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "name"), [pytest.param(ranks, name, id=name) for ranks, names in LAYOUTS.items() for name in names]
)
def test_twice_killed_is_bitwise_the_undisturbed_run(
    config: Path, tmp_path: Path, undisturbed_runs: Undisturbed, ranks: int, name: str
) -> None:
    output = tmp_path / "run"
    arguments = (config, *LAYOUTS[ranks][name], *COMMON, "checkpoint.every=20")

    job = Job(*arguments, ranks=ranks)
    job.wait_until((output / "checkpoints" / "step-20").exists)
    job.kill()
    job = Job(*arguments, ranks=ranks)
    # Some steps later. What is saved beside training may not be there at once.
    job.wait_until(lambda: (output / "checkpoints" / "step-40").exists() and last_step(output) >= 42)
    assert f"resuming from {output}/checkpoints/step-20" in job.kill()
    assert f"resuming from {output}/checkpoints/step-40" in Job(*arguments, ranks=ranks).finish()
    assert_bitwise_same(output, undisturbed_runs.output(ranks, name))


@pytest.fixture
def undisturbed(config: Path, tmp_path: Path) -> Path:
    output = tmp_path / "undisturbed"
    train(config, "train.steps=40", f"output={output}")
    return output


def test_killed_and_resumed_run_is_bitwise_the_undisturbed_one(config: Path, tmp_path: Path, undisturbed: Path) -> None:
    killed = tmp_path / "killed"
    arguments = (config, "train.steps=40", "checkpoint.every=20", "train.eval_every=10", f"output={killed}")
    kill_when(start(*arguments), killed / "checkpoints" / "step-20")
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 23, "loss": 1.0}\n{"step": 24, "lo')  # what a kill some steps later leaves
    printed = train(*arguments)
    assert "resuming from" in printed and "step-20" in printed

    assert [row["step"] for row in rows(killed)] == list(range(1, 41))
    assert losses(killed) == losses(undisturbed)
    assert [row["tokens"] for row in rows(killed)] == [row["tokens"] for row in rows(undisturbed)]
    ours, theirs = state(killed), state(undisturbed)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    evaluated = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").open() if "eval_loss" in line]
    assert evaluated == [10, 20, 30, 40]

    # The saved config restarts the run by itself, and there is nothing left to do.
    assert "already at step 40" in train(killed / "config.toml")
    assert losses(killed) == losses(undisturbed)


def test_run_killed_before_its_first_checkpoint_starts_again_and_says_so(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    kill_when(start(config, "train.steps=100000"), output / "metrics.jsonl")
    assert "starting again" in train(config)
    assert [row["step"] for row in rows(output)] == list(range(1, 7))

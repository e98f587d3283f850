"""kill -9 at whatever moment loses no checkpoint, and changes nothing of what training ends with."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megakrause.checkpoint.place import Place
from megakrause.checkpoint.read import newest_checkpoint
from tests.training.test_resume import Job, assert_bitwise_same, last_step

pytestmark = pytest.mark.faults

STEPS_A_KILL = 12
AHEAD = 6  # a kill comes at most so many steps after the last; ranks whose launcher was killed may get further

Victims = Callable[[random.Random, Job], list[psutil.Process]]


def everyone(rng: random.Random, job: Job) -> list[psutil.Process]:
    return job.processes()


def someone(rng: random.Random, job: Job) -> list[psutil.Process]:
    """A rank, or the launcher, which alone is there at first."""
    return [rng.choice(job.processes())]


class Trials:
    """A run that is killed again and again, by the same seed at the same moments as far as a clock can tell."""

    def __init__(self, config: Path, *keys: object, ranks: int, every: int, kills: int, victims: Victims):
        self.config, self.output = config, config.parent / "run"
        self.ranks, self.every, self.kills, self.victims = ranks, every, kills, victims
        self.place = Place.of(self.output / "checkpoints")
        self.steps = STEPS_A_KILL * kills
        self.keys = [*keys, f"train.steps={self.steps}", f"checkpoint.every={every}"]
        self.keys += ["checkpoint.keep=2", "log.tensorboard=false", "data.prefetch=1"]
        self.rng = random.Random(1)
        self.in_saves = 0
        self.undisturbed = self.output.with_name("undisturbed")

    def run(self) -> None:
        began = time.monotonic()
        job = self._start(f"output={self.undisturbed}")
        job.wait_until(lambda: last_step(self.undisturbed) > 0)
        self.seconds_of_start = time.monotonic() - began
        began = time.monotonic()
        job.wait_until(lambda: last_step(self.undisturbed) == self.steps)
        self.seconds_of_step = (time.monotonic() - began) / (self.steps - 1)
        job.finish()
        for kill in range(self.kills):
            if last_step(self.output) > self.steps - STEPS_A_KILL:  # too near its end to be killed again
                self._finish()
                shutil.rmtree(self.output)
            self._kill(asynchronous=bool(kill % 2))
        self._finish()

    def _finish(self) -> None:
        self._start().finish()
        assert_bitwise_same(self.output, self.undisturbed)

    def _start(self, *keys: object) -> Job:
        return Job(self.config, *self.keys, *keys, ranks=self.ranks)

    def _kill(self, asynchronous: bool) -> None:
        """Starts the run, kills it while it starts or some steps later, and looks at what is left."""
        before = last_step(self.output)
        job = self._start(f"checkpoint.asynchronous={str(asynchronous).lower()}")
        if self.rng.random() < 0.4:
            ends = time.monotonic() + self.rng.uniform(0, self.seconds_of_start)
            # A machine that has become faster may have come beyond the start by then.
            job.wait_until(lambda: time.monotonic() > ends or last_step(self.output) >= before + AHEAD)
        else:
            step = before + self.rng.randint(1, AHEAD)
            job.wait_until(lambda: last_step(self.output) >= step)
            time.sleep(self.rng.uniform(0, self.seconds_of_step))
        victims = self.victims(self.rng, job)
        committed = self.place.steps()
        saving = any(self.output.glob("checkpoints/step-*.tmp"))
        printed = job.kill(victims)

        newest, passed_over = newest_checkpoint(self.place)
        assert passed_over == {}, printed
        found = 0 if newest is None else newest.step
        assert found >= max(committed, default=0), printed
        if (last := last_step(self.output)) > before:
            self.in_saves += saving
            # All saves before this step were begun, and ended, but that a thread may still have been at the last.
            begun = (last - 1) // self.every * self.every
            assert found >= begun - self.every * asynchronous, (found, last, printed)


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [(1, 3), pytest.param(1, 20, marks=pytest.mark.slow), pytest.param(2, 10, marks=pytest.mark.slow)],
)
def test_killed_run_goes_on_from_what_was_saved_last(
    config: Path, record_property: Callable[[str, object], None], ranks: int, kills: int
) -> None:
    record_property("trials", kills)
    keys = {1: [], 2: ["parallel.zero=2"]}[ranks]
    victims = {1: everyone, 2: someone}[ranks]
    trials = Trials(config, *keys, ranks=ranks, every=ranks, kills=kills, victims=victims)
    trials.run()
    record_property("killed while saving", trials.in_saves)

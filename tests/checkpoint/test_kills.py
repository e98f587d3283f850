"""kill -9 at every named moment of a save by three ranks: what a restart finds is the old checkpoint or the new one, to
the bit, and it leaves nothing of what was interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest

from megakrause.checkpoint.read import newest_checkpoint
from megakrause.checkpoint.saver import Saver
from megakrause.checkpoint.write import Retention
from tests.checkpoint.points import AT_URL, IN_FOLDER, NEW, OLD, Point, watch
from tests.checkpoint.processes import LIMIT, RANKS, Nursery, fork, join, wait_all
from tests.checkpoint.states import NAMES, Home, damage, folders, is_whole, save, snapshot

pytestmark = pytest.mark.faults

Record = Callable[[str, object], None]
Start = Literal["earlier ones", "and a damaged one of this step", "nothing"]
STARTS: tuple[Start, ...] = ("earlier ones", "and a damaged one of this step", "nothing")
Launcher = Literal["waits", "terminates", "kills"]  # the ranks that are left: for a second, then it kills
LAUNCHERS: tuple[Launcher, ...] = ("waits", "kills", "terminates")
FAILED = 3  # exit status of a rank that was told that the checkpoint could not be saved


@dataclass(frozen=True)
class Trial:
    """Saving step 3."""

    point: Point
    scheme: str
    asynchronous: bool
    at: int  # the rank that comes to the point
    victim: int  # the rank that is killed then
    launcher: Launcher
    start: Start

    def __str__(self) -> str:
        how = "async" if self.asynchronous else "sync"
        where = "url" if self.scheme else "folder"
        return f"{where}-{how}-{self.point.name}-at {self.at}-kills {self.victim}-{self.launcher}-{self.start}"


def some_trials() -> list[Trial]:
    """Every point once in each way of saving; which rank, how the launcher and what was there take turns."""
    trials = []
    for scheme, asynchronous in (("", False), ("", True), ("file://", False)):
        for number, point in enumerate(AT_URL if scheme else IN_FOLDER):
            rank = (number + asynchronous) % RANKS if point.every_rank else 0
            starts = STARTS[:2] if point.found is NEW else STARTS
            start = STARTS[1] if point.again else starts[(number // 3 + 1) % len(starts)]
            launcher = LAUNCHERS[(number + asynchronous) % 3]
            trials.append(Trial(point, scheme, asynchronous, rank, rank, launcher, start))
    return trials


def all_trials() -> list[Trial]:
    """Every point on every rank that comes there, every victim, every launcher, in each way of saving. When the victim
    is another rank than that at the point, launchers take turns."""
    trials = []
    for scheme in ("", "file://"):
        for point in AT_URL if scheme else IN_FOLDER:
            starts = STARTS[1:2] if point.again else STARTS[:2] if point.found is NEW else STARTS
            trials += [
                Trial(point, scheme, asynchronous, at, victim, launcher, start)
                for asynchronous in (False, True)
                for at in range(RANKS if point.every_rank else 1)
                for victim in range(RANKS)
                for number, start in enumerate(starts)
                for launcher in (LAUNCHERS if victim == at else [LAUNCHERS[(victim + number) % 3]])
            ]
    return trials


@pytest.mark.parametrize("trial", some_trials(), ids=str)
def test_a_restart_finds_one_whole_state(nursery: Nursery, trial: Trial, record_property: Record) -> None:
    record_property("trials", 1)
    judge(trial, nursery.call(run, trial))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "file://"], ids=["folder", "url"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("part", range(8))
def test_a_restart_finds_one_whole_state_whoever_dies(
    nursery: Nursery, scheme: str, asynchronous: bool, part: int, record_property: Record
) -> None:
    trials = [trial for trial in all_trials() if (trial.scheme, trial.asynchronous) == (scheme, asynchronous)]
    assert len(trials) > 300
    record_property("trials", len(trials[part::8]))
    problems = []
    for trial in trials[part::8]:
        try:
            judge(trial, nursery.call(run, trial))
        except AssertionError as error:
            problems.append(f"{trial}: {str(error)[:300]}")
    assert not problems, f"{len(problems)} of {len(trials[part::8])}:\n" + "\n".join(problems)


def judge(trial: Trial, seen: dict[str, Any]) -> None:
    assert seen["victim"] == -signal.SIGKILL
    # No rank that is left says that it has saved, and all end soon.
    assert all(status not in (0, None) for status in seen["others"]), seen
    before = "nothing" if trial.start == "nothing" else OLD
    if trial.victim == trial.at:
        assert seen["found"] == (before if trial.point.found is OLD else NEW), seen
    else:  # the rank at the point goes on, until it is killed or misses the other
        assert seen["found"] in (before, NEW), seen
    assert seen["again"] == NEW and seen["passed over"] == {}, seen
    assert seen["left"] == ["step-3"] and seen["files"] == sorted(NAMES), seen


# ---- in the nursery


def run(trial: Trial) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as temporary:
        folder = Path(temporary)
        home = Home(folder / "checkpoints", trial.scheme)
        if trial.start != "nothing":
            shutil.copytree(start(trial.start).name, home.root)
        pids = [fork(lambda rank=rank: rank_of(trial, home, folder, rank)) for rank in range(RANKS)]  # type: ignore[misc]
        victim = pids.pop(trial.victim)
        statuses = wait_all([victim], LIMIT)
        if trial.launcher != "waits":
            for pid in pids:
                os.kill(pid, signal.SIGTERM if trial.launcher == "terminates" else signal.SIGKILL)
        others = wait_all(pids, 1)
        for pid in set(pids) - set(others):
            os.kill(pid, signal.SIGKILL)
        others |= wait_all([pid for pid in pids if pid not in others], LIMIT)
        seen: dict[str, Any] = {"victim": statuses.get(victim), "others": [others.get(pid) for pid in pids]}
        seen["errors"] = [path.read_text()[-300:] for path in sorted(folder.glob("stderr-*"))]

        checkpoint, _ = newest_checkpoint(home.place())
        if checkpoint is None:
            seen["found"] = "nothing"
        else:
            states = {OLD: is_whole(checkpoint, 2), NEW: is_whole(checkpoint, 3, ranks=RANKS)}
            seen["found"] = next((name for name, whole in states.items() if whole), f"a mix in {checkpoint.path}")

        # What the next start does, with fewer ranks.
        home.place().clean()
        save(home.name, 3, last=1)
        checkpoint, passed_over = newest_checkpoint(home.place())
        seen |= {"again": NEW if is_whole(checkpoint, 3) else "a mix", "passed over": passed_over}
        seen |= {"left": folders(home.root), "files": folders(home.root / "step-3")}
        return seen


def rank_of(trial: Trial, home: Home, folder: Path, rank: int) -> None:
    """Saves step 3, as one of several ranks; ends with status FAILED when that fails."""
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    place, axis = home.place(), join(folder / "store", rank)
    axis.together(lambda: None)
    victim, event = int((folder / f"pid-{trial.victim}").read_text()), trial.point.event.format(rank=rank)

    def reached(moment: str) -> None:
        if rank == trial.at and moment == event:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            if victim == os.getpid():
                time.sleep(LIMIT)

    watch(reached)
    saver = Saver(place, axis, Retention(last=1), asynchronous=trial.asynchronous)
    saver.save(snapshot(3, axis))
    if saver.wait() is not None:
        os._exit(FAILED)


@cache
def start(kind: Start) -> tempfile.TemporaryDirectory[str]:
    """A folder of checkpoints of steps 1 and 2, good, and perhaps another one of step 3 that is not."""
    kept = tempfile.TemporaryDirectory(prefix="megakrause-start-")  # for as long as the nursery
    root = Path(kept.name)
    for step in (1, 2):
        save(root, step)
    if kind == "and a damaged one of this step":
        save(root, 3, last=9, seed=4)
        damage(root / "step-3" / "state.json")
    return kept

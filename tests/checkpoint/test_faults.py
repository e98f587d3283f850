"""Kills at every moment, full disks, and several ranks of which one fails: the last good checkpoint is never lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.read import Checkpoint, find_checkpoint, newest_checkpoint
from megakrause.errors import UserError
from megakrause.parallel.mesh import Axis
from tests.checkpoint.processes import FULL, RANKS, Nursery, fork, limit_file_size, run_alone, run_ranks, wait
from tests.checkpoint.states import (
    FILES,
    NAMES,
    Home,
    cut,
    damage,
    folders,
    is_whole,
    message_of,
    save,
)

pytestmark = pytest.mark.faults

SCHEMES = pytest.mark.parametrize("scheme", ["", "file://"], ids=["folder", "url"])


# ---- kills


@SCHEMES
def test_a_kill_at_any_moment_of_a_save_leaves_a_usable_checkpoint(
    nursery: Nursery, scheme: str, record_property: Callable[[str, object], None]
) -> None:
    kills: list[dict[str, Any]] = nursery.call(kill_at_every_moment, scheme)
    record_property("trials", len(kills))
    assert len(kills) > 30 and {kill["killed"] for kill in kills[:-1]} == {True} and not kills[-1]["killed"]
    for kill in kills:
        assert kill["problem"] is None, kill
        assert kill["found"] == (2 if not kill["committed"] else 3), kill
        assert kill["half removed"] == [], kill
        assert kill["afterwards"] == ["step-3"], kill
    found = [kill["found"] for kill in kills]
    assert found == sorted(found) and set(found) == {2, 3}  # the old one up to one moment, the new one from then on


TOUCHES = {"open", "write", "fsync", "mkdir", "rename", "unlink", "remove", "rmdir", "__exit__"}  # change the disk


def kill_at(moment: int) -> None:
    """Kills this process before it touches the disk for that time."""
    left = moment

    def profile(frame: FrameType, event: str, function: Any) -> None:
        nonlocal left
        if event == "c_call" and function.__name__ in TOUCHES:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    threading.setprofile(profile)  # what is at a URL is asked for in threads


def kill_at_every_moment(scheme: str) -> list[dict[str, Any]]:
    """Saves step 3 where steps 1 and 2 are good and an earlier step 3 is damaged, killed a little later every time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        start = Path(folder) / "start"
        for step in (1, 2, 3):
            save(start, step, last=9, seed=4 if step == 3 else None)
        damage(start / "step-3" / "state.json")
        results: list[dict[str, Any]] = []
        while not results or results[-1]["killed"]:
            home = Home(Path(folder) / "killed", scheme)
            shutil.copytree(start, home.root)
            results.append(kill_once(home, len(results)))
            shutil.rmtree(home.root)
    return results


def kill_once(home: Home, moment: int) -> dict[str, Any]:
    def killed() -> None:
        place = home.place()  # where packages are imported, which opens files
        kill_at(moment)
        save(place, 3, last=1)

    result: dict[str, Any] = {"moment": moment, "killed": wait(fork(killed)), "problem": None}
    result["committed"] = is_sound(home.step(3))
    checkpoint, _ = newest_checkpoint(home.place())
    assert checkpoint is not None
    result["found"] = checkpoint.step
    if not is_whole(checkpoint, checkpoint.step):
        result["problem"] = "other content"
    result["half removed"] = [step for step in home.place().steps() if step in (1, 2) and not is_sound(home.step(step))]
    # What the next start does.
    home.place().clean()
    save(home.name, 3, last=1)
    home.place().clean()
    result["afterwards"] = folders(home.root)
    return result


def is_sound(folder: str) -> bool:
    try:
        return Checkpoint(folder).verify() is None
    except UserError:
        return False


# ---- full disks


@SCHEMES
@pytest.mark.parametrize(
    "limit, files, stops_at",
    [(512, FILES, "rank-00000.safetensors"), (16384, FILES | {"z.bin": bytes(20000)}, "z.bin")],
    ids=["first file", "later file"],
)
def test_a_full_disk_is_an_error_and_leaves_what_was_there(
    nursery: Nursery, root: Path, scheme: str, limit: int, files: dict[str, bytes], stops_at: str
) -> None:
    home = Home(root, scheme)
    kind, message = nursery.call(run_alone, save_with_limit, home, limit, files)
    assert kind == "UserError" and f"/{stops_at}: " in message and FULL[2:] in message
    assert scheme or message.endswith(stops_at + FULL)
    assert folders(root) == ["step-1"]
    assert is_whole(find_checkpoint(home.step(1)), 1)


def save_with_limit(home: Home, limit: int, files: dict[str, bytes]) -> tuple[str, str]:
    """Returns what was raised."""
    limit_file_size(limit)
    try:
        save(home.name, 2, last=1, files=files)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    return "", "nothing"


# ---- several ranks


@SCHEMES
def test_several_ranks_save_one_checkpoint(nursery: Nursery, tmp_path: Path, scheme: str) -> None:
    """Fragments cut at random places over the ranks come back, to any number of ranks, to the bit."""
    home = Home(tmp_path / "checkpoints", scheme)
    seen = nursery.call(run_ranks, save_three, home)
    for step in (1, 2, 3):
        checkpoint = Checkpoint(home.step(step))
        assert checkpoint.verify() is None and is_whole(checkpoint, step, ranks=RANKS)
        assert {r.name for r in checkpoint.files} == {*NAMES[1:], *(f"rank-{n:05d}.safetensors" for n in range(RANKS))}
    assert seen == RANKS * [(3, {})]


def save_three(axis: Axis, home: Home) -> tuple[int, dict[int, str]]:
    for step in (1, 2, 3):
        save(home.name, step, axis=axis, last=9)
    checkpoint, passed_over = newest_checkpoint(home.place(), axis)
    assert is_whole(checkpoint, 3, ranks=RANKS) and checkpoint is not None
    return checkpoint.step, passed_over


@SCHEMES
def test_all_ranks_see_the_damage_that_one_reads(nursery: Nursery, tmp_path: Path, scheme: str) -> None:
    home = Home(tmp_path / "checkpoints", scheme)
    nursery.call(run_ranks, save_three, home)
    damage(home.root / "step-3" / "rank-00001.safetensors", -1)
    seen = nursery.call(run_ranks, look, home)
    for rank in seen:
        assert rank == seen[0]
        assert "rank-00001.safetensors does not match its checksum" in rank["verify"]
        assert "rank-00001.safetensors does not match its checksum" in rank["find"]
        assert rank["newest"] == 2
        assert list(rank["passed over"]) == [3]


def look(axis: Axis, home: Home) -> dict[str, Any]:
    checkpoint, passed_over = newest_checkpoint(home.place(), axis)
    return {
        "verify": Checkpoint(home.step(3)).verify(axis),
        "find": message_of(lambda: find_checkpoint(home.step(3), axis)),
        "newest": checkpoint and checkpoint.step,
        "passed over": passed_over,
    }


@SCHEMES
@pytest.mark.parametrize("case", ["full disk on rank 1", "user error on rank 2", "full disk on rank 0"])
def test_a_failure_of_one_rank_is_raised_on_all_and_leaves_what_was_there(
    nursery: Nursery, root: Path, scheme: str, case: str
) -> None:
    home = Home(root, scheme)
    save(home.name, 3)
    damage(root / "step-3" / "state.json")
    who = int(case[-1])
    seen = nursery.call(run_ranks, fail, home, case, who)
    assert len({rank["error"] for rank in seen}) == 1  # the same on every rank
    for rank in seen:
        assert rank["error"].startswith(f"rank {who}: ")
        if case.startswith("user error"):
            assert rank["error"].endswith(": no moments here")
        else:
            assert f"rank-0000{who}.safetensors" in rank["error"] and FULL[2:] in rank["error"]
        assert rank["newest"] == 1
    assert folders(root) == ["step-1", "step-3"]  # 3 is the damaged one


def fail(axis: Axis, home: Home, case: str, who: int) -> dict[str, Any]:
    def no_moments() -> Iterator[Fragment]:
        yield cut(4, RANKS)[axis.rank][0]
        raise UserError("no moments here")

    changes: dict[str, Any] = {}
    if axis.rank == who:
        if case.startswith("full disk"):
            limit_file_size(512)
        else:
            changes = {"fragments": no_moments()}
    attempt: Callable[[], Any] = lambda: save(home.name, 4, axis=axis, **changes)  # noqa: E731
    error = message_of(attempt)
    limit_file_size(resource.RLIM_INFINITY)
    checkpoint, _ = newest_checkpoint(home.place(), axis)
    return {"error": error, "newest": checkpoint and checkpoint.step}

"""Saving beside training: the same bytes as standing still, whatever training does meanwhile; failures are told."""

from __future__ import annotations

import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.place import Place
from megakrause.checkpoint.read import find_checkpoint
from megakrause.checkpoint.saver import Saver
from megakrause.checkpoint.write import Retention, Snapshot
from megakrause.errors import UserError
from megakrause.parallel.mesh import ALONE, Axis
from tests.checkpoint.points import watch
from tests.checkpoint.processes import FULL, RANKS, Nursery, limit_file_size, run_alone, run_ranks
from tests.checkpoint.states import (
    Home,
    contents,
    cut,
    folders,
    is_whole,
    save,
    snapshot,
)
from tests.checkpoint.stores import Store
from tests.disks import needs_root, small_disk

pytestmark = pytest.mark.faults

BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
SCHEMES = pytest.mark.parametrize("scheme", ["", "file://"], ids=["folder", "url"])


def state_of(step: int, axis: Axis = ALONE) -> Snapshot:
    """Cut at the same places at every step, as an engine does."""
    return snapshot(step, axis, cuts=0)


def saver_of(home: Home, axis: Axis = ALONE, *, asynchronous: bool = True, last: int = 9) -> Saver:
    return Saver(home.place(), axis, Retention(last), asynchronous=asynchronous)


# ---- the same bytes


@SCHEMES
@pytest.mark.parametrize("what", ["fragments", "rng", "state", "files"])
def test_what_changes_right_after_a_save_is_not_in_it(nursery: Nursery, tmp_path: Path, scheme: str, what: str) -> None:
    """On one rank and on several, where the writing is held up until everything has changed."""
    for step in (1, 2, 3):
        save(tmp_path / "expected", step, last=9, fragments=state_of(step).fragments)
    home = Home(tmp_path / "one", scheme)
    nursery.call(run_alone, save_and_change, ALONE, home, what)
    for step in (1, 2, 3):
        assert contents(home.root / f"step-{step}") == contents(tmp_path / "expected" / f"step-{step}")

    nursery.call(run_ranks, save_three, Home(tmp_path / "expected of several", ""))
    home = Home(tmp_path / "several", scheme)
    nursery.call(run_ranks, save_and_change, home, what)
    for step in (1, 2, 3):
        assert contents(home.root / f"step-{step}") == contents(tmp_path / "expected of several" / f"step-{step}")
        assert is_whole(find_checkpoint(home.step(step)), step, ranks=RANKS)


def save_three(axis: Axis, home: Home) -> None:
    for step in (1, 2, 3):
        save(home.name, step, axis=axis, last=9, fragments=state_of(step, axis).fragments)


def save_and_change(axis: Axis, home: Home, what: str) -> None:
    """The tensors are the same ones from save to save and change in place, as an engine's do."""
    go_on = threading.Event()
    watch(lambda moment: go_on.wait(30) if threading.current_thread() is not threading.main_thread() else None)
    saver = saver_of(home, axis)
    tensors = [fragment.tensor for fragment in state_of(1, axis).fragments]
    for step in (1, 2, 3):
        given = state_of(step, axis)
        for tensor, fragment in zip(tensors, given.fragments, strict=True):
            tensor.copy_(fragment.tensor)
        fragments = [replace(f, tensor=tensor) for tensor, f in zip(tensors, given.fragments, strict=True)]
        state, files = dict(given.state), dict(given.files)
        saver.reserve(fragments)
        saver.save(replace(given, fragments=fragments, state=state, files=files))
        match what:
            case "fragments":
                for tensor in tensors:
                    tensor.fill_(0.25)
            case "rng":
                for generator in given.rng.values():
                    generator.fill_(7)
            case "state":
                state["position"], state["tokens"] = -1, "changed"
            case "files":
                files["config.toml"] = b"changed"
        go_on.set()
        assert saver.wait() is None
        go_on.clear()
    assert not saver.has_failed


def test_nested_state_is_copied_too(nursery: Nursery, tmp_path: Path) -> None:
    nursery.call(run_alone, save_nested, Home(tmp_path, ""))
    assert find_checkpoint(tmp_path / "step-1").state["streams"] == [{"at": 5}]


def save_nested(home: Home) -> None:
    go_on = threading.Event()
    watch(lambda moment: go_on.wait(30) if threading.current_thread() is not threading.main_thread() else None)
    streams = [{"at": 5}]
    saver = saver_of(home)
    saver.save(replace(state_of(1), state={"streams": streams}))
    streams[0]["at"] = 6
    go_on.set()
    assert saver.wait() is None


@BOTH
def test_saves_follow_one_another(tmp_path: Path, asynchronous: bool) -> None:
    """Without a wait between them."""
    home = Home(tmp_path, "")
    saver = saver_of(home, asynchronous=asynchronous)
    for step in range(1, 6):
        seconds = saver.save(state_of(step))
        assert 0 <= seconds < 30
    assert saver.wait() is None and saver.wait() is None and not saver.has_failed
    for step in range(1, 6):
        assert is_whole(find_checkpoint(home.step(step)), step)


def test_training_goes_on_while_a_slow_store_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, go_on = Home(tmp_path, "store://"), threading.Event()
    monkeypatch.setattr(Store, "fault", lambda when, operation, path: operation == "close" and go_on.wait(60))
    saver = saver_of(home)
    saver.reserve(state_of(1).fragments)
    saver.save(state_of(1))
    assert not (tmp_path / "step-1" / "COMMIT.json").exists() and not saver.has_failed
    threading.Timer(0.5, go_on.set).start()
    stood_still = saver.save(state_of(2))  # which waits for the first
    assert stood_still > 0.4 and is_whole(find_checkpoint(home.step(1)), 1)
    assert saver.wait() is None and is_whole(find_checkpoint(home.step(2)), 2)


# ---- failures


@BOTH
@SCHEMES
@pytest.mark.parametrize("who", range(RANKS))
def test_a_full_disk_is_told_on_every_rank_once_and_the_next_save_works(
    nursery: Nursery, root: Path, asynchronous: bool, scheme: str, who: int
) -> None:
    home = Home(root, scheme)
    seen = nursery.call(run_ranks, save_on_full_disk, home, asynchronous, who)
    assert len({rank["error"] for rank in seen}) == 1
    for rank in seen:
        assert rank["error"].startswith(f"rank {who}: ") and f"rank-0000{who}.safetensors" in rank["error"]
        assert FULL[2:] in rank["error"]
        assert rank["failed"] == [True, False, False]  # before `wait`, after it, and after the next save
        assert rank["again"] is None and rank["next"] is None
        assert rank["old"] == [True, ["step-1"]]
    assert folders(root) == ["step-1", "step-2"]
    assert is_whole(find_checkpoint(home.step(1)), 1)
    assert is_whole(find_checkpoint(home.step(2)), 2, ranks=RANKS)


def save_on_full_disk(axis: Axis, home: Home, asynchronous: bool, who: int) -> dict[str, Any]:
    saver = saver_of(home, axis, asynchronous=asynchronous)
    if axis.rank == who:
        limit_file_size(512)
    saver.save(state_of(2, axis))
    seen = failure_of(saver, axis)
    limit_file_size(resource.RLIM_INFINITY)
    old = [is_whole(find_checkpoint(home.step(1)), 1), folders(home.root)]
    axis.together(lambda: None)
    saver.save(state_of(2, axis))
    seen["next"] = saver.wait()
    seen["failed"].append(saver.has_failed)
    return seen | {"old": old}


def failure_of(saver: Saver, axis: Axis) -> dict[str, Any]:
    """What a rank learns of a save that fails."""
    deadline = time.monotonic() + 30
    while not saver.has_failed and time.monotonic() < deadline:
        time.sleep(0.005)
    failed, error = [saver.has_failed], saver.wait()
    assert error is None or type(error) is UserError
    failed.append(saver.has_failed)
    again = saver.wait()
    axis.together(lambda: None)  # all know; the next save may begin, and what was begun is removed
    return {"error": None if error is None else str(error), "failed": failed, "again": again}


@needs_root
@BOTH
def test_a_real_disk_that_is_full_is_used_again_when_it_has_room(
    nursery: Nursery, tmp_path: Path, asynchronous: bool
) -> None:
    with small_disk(tmp_path / "disk", "900k") as disk:
        save(disk, 1)
        seen = nursery.call(run_ranks, save_beside_filler, Home(disk, ""), asynchronous)
        assert len({rank["error"] for rank in seen}) == 1 and "No space left on device" in seen[0]["error"]
        for rank in seen:
            assert rank["failed"] == [True, False] and rank["again"] is None and rank["next"] is None
            assert rank["old"]
        assert is_whole(find_checkpoint(disk / "step-2"), 2, ranks=RANKS)


def save_beside_filler(axis: Axis, home: Home, asynchronous: bool) -> dict[str, Any]:
    def fill() -> None:
        with open(home.root / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
            except OSError:
                pass

    saver = saver_of(home, axis, asynchronous=asynchronous)
    axis.together(lambda: fill() if axis.rank == 0 else None)
    saver.save(state_of(2, axis))
    seen = failure_of(saver, axis)
    old = is_whole(find_checkpoint(home.step(1)), 1)
    axis.together(lambda: (home.root / "filler").unlink() if axis.rank == 0 else None)
    saver.save(state_of(2, axis))
    return seen | {"next": saver.wait(), "old": old}


@needs_root
@BOTH
def test_a_folder_for_reading_only_is_told_on_every_rank(nursery: Nursery, tmp_path: Path, asynchronous: bool) -> None:
    with small_disk(tmp_path / "disk", "900k") as disk:
        save(disk, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        seen = nursery.call(run_ranks, save_and_fail, Home(disk, ""), asynchronous)
        assert {rank["error"] for rank in seen} == {f"rank 0: {disk}/step-2.tmp: Read-only file system"}
        assert all(rank["failed"] == [True, False] and rank["again"] is None for rank in seen)
        assert folders(disk) == ["step-1"] and is_whole(find_checkpoint(disk), 1)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        nursery.call(run_ranks, save_three, Home(disk, ""))
        assert is_whole(find_checkpoint(disk), 3, ranks=RANKS)


def save_and_fail(axis: Axis, home: Home, asynchronous: bool) -> dict[str, Any]:
    saver = saver_of(home, axis, asynchronous=asynchronous)
    saver.save(state_of(2, axis))
    return failure_of(saver, axis)


@BOTH
@SCHEMES
@pytest.mark.parametrize("rank, moment", [(1, "after open {}"), (1, "after write 2 of {}"), (0, "before open {}")])
def test_a_folder_that_goes_away_under_way_is_told_on_every_rank(
    nursery: Nursery, root: Path, asynchronous: bool, scheme: str, rank: int, moment: str
) -> None:
    home = Home(root, scheme)
    name = ("COMMIT.json.tmp" if scheme else "COMMIT.json") if rank == 0 else f"rank-0000{rank}.safetensors"
    seen = nursery.call(run_ranks, save_while_removed, home, asynchronous, rank, moment.format(name))
    assert len({rank["error"] for rank in seen}) == 1 and "No such file or directory" in seen[0]["error"]
    for one in seen:
        assert one["failed"] == [True, False] and one["again"] is None
    assert is_whole(find_checkpoint(home.step(1)), 1) and home.place().steps() == [1]
    home.place().clean()
    save(home.name, 2, last=1)
    assert folders(root) == ["step-2"] and is_whole(find_checkpoint(home.name), 2)


def save_while_removed(axis: Axis, home: Home, asynchronous: bool, rank: int, moment: str) -> dict[str, Any]:
    """Rank `rank` removes the folder in that moment."""
    saver = saver_of(home, axis, asynchronous=asynchronous)
    folder = home.root / ("step-2" if home.scheme else "step-2.tmp")

    def remove(reached: str) -> None:
        while reached == moment and folder.exists():  # others may be making files in it
            shutil.rmtree(folder, ignore_errors=True)

    if axis.rank == rank:
        watch(remove)
    saver.save(state_of(2, axis))
    return failure_of(saver, axis)


@BOTH
def test_an_error_that_is_none_of_the_users_is_raised(root: Path, asynchronous: bool) -> None:
    saver = saver_of(Home(root, ""), asynchronous=asynchronous)

    def fragments() -> Iterator[Fragment]:
        yield cut(2, 1)[0][0]
        raise RuntimeError("the engine broke")

    saver.save(replace(state_of(2), fragments=fragments()))
    deadline = time.monotonic() + 10
    while not saver.has_failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="the engine broke"):
        saver.wait()
    assert not saver.has_failed and saver.wait() is None
    assert folders(root) == ["step-1"]
    saver.save(state_of(2))
    assert saver.wait() is None and is_whole(find_checkpoint(root), 2)


@BOTH
def test_fragments_that_one_rank_does_not_have_are_told_on_every_rank(
    nursery: Nursery, root: Path, asynchronous: bool
) -> None:
    """Also when they are missed while they are copied, which the others have done by then."""
    seen = nursery.call(run_ranks, save_without_moments, Home(root, ""), asynchronous)
    assert {rank["error"] for rank in seen} == {"rank 2: no moments here"}
    assert folders(root) == ["step-1"] and is_whole(find_checkpoint(root), 1)


def save_without_moments(axis: Axis, home: Home, asynchronous: bool) -> dict[str, Any]:
    def no_moments() -> Iterator[Fragment]:
        yield cut(2, RANKS)[axis.rank][0]
        raise UserError("no moments here")

    saver = saver_of(home, axis, asynchronous=asynchronous)
    given = state_of(2, axis)
    saver.save(replace(given, fragments=no_moments()) if axis.rank == 2 else given)
    return {"error": str(saver.wait())}


def test_an_error_in_the_thread_that_is_none_of_the_users_is_raised(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saver_of(Home(root, ""))
    monkeypatch.setattr(type(saver.place), "begin", lambda self, step: 1 // 0)
    saver.save(state_of(2))
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    assert not saver.has_failed and is_whole(find_checkpoint(root), 1)


def test_a_rank_that_dies_is_an_error_for_the_others(nursery: Nursery, root: Path) -> None:
    """No UserError: nothing of theirs is wrong."""
    seen = nursery.call(run_ranks, save_without_one, Home(root, ""))
    assert seen[0] == seen[1] == "RuntimeError"
    assert is_whole(find_checkpoint(root), 1) and Place.of(root).steps() == [1]


def save_without_one(axis: Axis, home: Home) -> str:
    if axis.rank == 2:
        dist.destroy_process_group()  # the others see its end
        return "gone"
    saver = saver_of(home, axis)
    saver.save(state_of(2, axis))
    try:
        saver.wait()
    except RuntimeError:
        return "RuntimeError"
    return "nothing"


def test_nothing_is_copied_when_training_stands_still(root: Path) -> None:
    """The fragments that are written are the engine's own, one after the other."""
    saver = saver_of(Home(root, ""), asynchronous=False)
    saver.reserve(state_of(2).fragments)
    given = state_of(2)
    taken: list[int] = []

    def fragments() -> Iterator[Fragment]:
        for fragment in given.fragments:
            taken.append(threading.get_ident())
            yield fragment

    saver.save(replace(given, fragments=fragments()))
    assert set(taken) == {threading.get_ident()} and is_whole(find_checkpoint(root), 2)
    assert saver._buffers == {}

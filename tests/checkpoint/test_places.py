"""Checkpoints at URLs: uploads and removals that end halfway, and stores that fail for a while or for good."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from megakrause.checkpoint.place import Place
from megakrause.checkpoint.read import Checkpoint, find_checkpoint, newest_checkpoint
from megakrause.errors import UserError
from megakrause.parallel.mesh import Axis
from tests.checkpoint.processes import RANKS, Nursery, run_ranks
from tests.checkpoint.states import (
    NAMES,
    Home,
    contents,
    cut,
    damage,
    folders,
    is_whole,
    message_of,
    save,
)
from tests.checkpoint.stores import Fault, Store, failing

pytestmark = pytest.mark.faults


@pytest.fixture
def remote(root: Path) -> Home:
    """A place with one good checkpoint, of step 1, called by a URL."""
    return Home(root, "file://")


@pytest.fixture
def shaky(root: Path) -> Home:
    """The same in a store that fails when it is told to."""
    return Home(root, "store://")


# ---- what ends halfway


@pytest.mark.parametrize("uploaded", range(len(NAMES)))
def test_an_interrupted_upload_is_no_checkpoint_and_is_removed(remote: Home, uploaded: int) -> None:
    """Files are uploaded in some order; COMMIT.json is the last."""
    save(remote.name, 2)
    names = [name for name in NAMES if name != "COMMIT.json"]
    for name in [*names[uploaded:], "COMMIT.json"]:
        (remote.root / "step-2" / name).unlink()
    assert remote.place().steps() == [1]
    checkpoint, passed_over = newest_checkpoint(remote.place())
    assert is_whole(checkpoint, 1) and passed_over == {}
    with pytest.raises(UserError, match="step-2 is not a checkpoint: COMMIT.json is missing"):
        Checkpoint(remote.step(2))
    remote.place().clean()
    assert folders(remote.root) == ["step-1"] and is_whole(find_checkpoint(remote.name), 1)


def test_a_cleaning_leaves_everything_else(remote: Home) -> None:
    shutil.copytree(remote.root / "step-1", remote.root / "best" / "step-5")
    (remote.root / "best" / "step-5" / "COMMIT.json").unlink()  # someone else's: not of this place
    (remote.root / "step-1-notes").mkdir()
    (remote.root / "step-1-notes" / "notes.txt").touch()
    (remote.root / "step-2").mkdir()
    (remote.root / "step-2" / "state.json").touch()
    (remote.root / "step-3.txt").touch()
    remote.place().clean()
    assert folders(remote.root) == ["best", "step-1", "step-1-notes", "step-3.txt"]
    assert len(folders(remote.root / "best" / "step-5")) == len(NAMES) - 1
    Place.of(f"{remote.name}/nowhere").clean()


def test_checkpoints_of_a_folder_below_are_not_of_this_place(remote: Home) -> None:
    shutil.copytree(remote.root / "step-1", remote.root / "best" / "step-5")
    assert remote.place().steps() == [1]
    assert is_whole(find_checkpoint(remote.name), 1)
    save(remote.name, 2, last=1)
    assert remote.place().steps() == [2]


def test_a_removal_that_ends_halfway_does_not_look_like_a_checkpoint(
    remote: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 3):
        save(remote.name, step, last=9)
    monkeypatch.setattr(shutil, "rmtree", lambda path, *_, **__: (Path(path) / "state.json").unlink())
    remote.place().remove(3)
    monkeypatch.undo()
    assert set(folders(remote.root / "step-3")) == set(NAMES) - {"COMMIT.json", "state.json"}
    checkpoint, passed_over = newest_checkpoint(remote.place())
    assert is_whole(checkpoint, 2) and passed_over == {}
    remote.place().clean()
    assert folders(remote.root) == ["step-1", "step-2"]


def test_a_damaged_newest_is_passed_over_and_written_again(remote: Home) -> None:
    save(remote.name, 2)
    damage(remote.root / "step-2" / "rank-00000.safetensors")
    checkpoint, passed_over = newest_checkpoint(remote.place())
    assert is_whole(checkpoint, 1) and list(passed_over) == [2]
    save(remote.name, 2, last=1)
    checkpoint, passed_over = newest_checkpoint(remote.place())
    assert is_whole(checkpoint, 2) and passed_over == {}
    assert folders(remote.root) == ["step-2"]


# ---- stores that fail and come back

WRITING = ["rm_file", "rm", "makedirs", "open", "write", "close", "pipe_file", "mv", "ls"]
READING = ["info", "cat_file", "ls"]
ERRORS = [
    ConnectionError("connection reset by peer"),
    OSError(5, "Input/output error"),
    TimeoutError("no answer"),
    RuntimeError("503 slow down"),
]


@pytest.mark.parametrize("operation", WRITING)
@pytest.mark.parametrize("when", ["before", "after"])  # the answer may be lost of what was done
def test_what_is_written_through_a_store_that_comes_back_is_the_same(
    shaky: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, when: str
) -> None:
    for root in (shaky.root, tmp_path / "expected"):
        save(root, 2, last=9, seed=3)
        damage(root / "step-2" / "state.json")
    save(tmp_path / "expected", 2, last=1)
    seen: list[BaseException] = []
    for error in ERRORS:
        monkeypatch.setattr(Store, "fault", noting(seen, failing(operation, when, 3, error)))
        save(shaky.name, 2, last=1)
        monkeypatch.setattr(Store, "fault", None)
        assert 0 < seen.count(error) <= 3  # so it had to ask again; what is removed is not removed a second time
        assert contents(shaky.root / "step-2") == contents(tmp_path / "expected" / "step-2")
        assert folders(shaky.root) == ["step-2"]
        save(shaky.root, 1, last=9)


@pytest.mark.parametrize("operation", READING)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_read_through_a_store_that_comes_back_is_the_same(
    shaky: Home, monkeypatch: pytest.MonkeyPatch, operation: str, when: str
) -> None:
    seen: list[BaseException] = []
    for error in ERRORS:
        monkeypatch.setattr(Store, "fault", noting(seen, failing(operation, when, 3, error)))
        checkpoint, passed_over = newest_checkpoint(shaky.place())
        assert is_whole(checkpoint, 1) and passed_over == {}
        assert seen.count(error) == 3


def noting(seen: list[BaseException], fault: Fault) -> Fault:
    def noted(when: str, operation: str, path: str) -> None:
        try:
            fault(when, operation, path)
        except BaseException as error:
            seen.append(error)
            raise

    return noted


def test_reading_goes_on_where_a_store_failed_between_ranges(shaky: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, count = Checkpoint(shaky.step(1)), 0

    def every_other(when: str, operation: str, path: str) -> None:
        nonlocal count
        if (when, operation) == ("before", "cat_file"):
            count += 1
            if count % 2:
                raise ConnectionError("connection reset by peer")

    monkeypatch.setattr(Store, "fault", every_other)
    assert checkpoint.verify() is None and is_whole(checkpoint, 1)
    assert count > 20


def test_what_comes_short_or_damaged_is_noticed(shaky: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    cat_file = Store.cat_file
    for change in (lambda content: content[:-1], lambda content: bytes([content[0] ^ 1]) + content[1:]):
        monkeypatch.setattr(Store, "cat_file", lambda *a, change=change, **o: change(cat_file(*a, **o)))
        with pytest.raises(UserError, match="step-1"):
            find_checkpoint(shaky.step(1))
        monkeypatch.setattr(Store, "cat_file", cat_file)
        checkpoint = Checkpoint(shaky.step(1))
        monkeypatch.setattr(
            Store,
            "cat_file",
            lambda self, path, *a, change=change, **o: (
                change(cat_file(self, path, *a, **o)) if "rank-" in path else cat_file(self, path, *a, **o)
            ),
        )
        assert "rank-00000.safetensors does not match its checksum" in str(checkpoint.verify())
        monkeypatch.setattr(Store, "cat_file", cat_file)


def test_a_file_that_does_not_count_what_it_takes_takes_everything(
    shaky: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some stores' files return None from write, paramiko's (sftp://) among them."""
    taken = 0

    def fault(when: str, operation: str, path: str) -> None:
        nonlocal taken
        if (when, operation) == ("before", "write"):
            taken += 1
            assert taken < 1000, "the same bytes are written again and again"

    monkeypatch.setattr(Store, "fault", fault)
    monkeypatch.setattr(Store, "counts", False)
    save(shaky.name, 2)
    assert is_whole(find_checkpoint(shaky.step(2)), 2)


# ---- stores that fail for good


@pytest.mark.parametrize("operation", ["makedirs", "open", "write", "close", "pipe_file", "mv"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_store_that_stays_away_is_an_error_and_leaves_what_was_there(
    shaky: Home, monkeypatch: pytest.MonkeyPatch, operation: str, when: str
) -> None:
    monkeypatch.setattr(Store, "fault", failing(operation, when, float("inf"), ConnectionError("no route to host")))
    began = time.monotonic()
    with pytest.raises(UserError, match=f"cannot write {shaky.name}/step-2.*: no route to host; given up after"):
        save(shaky.name, 2, last=1)
    assert time.monotonic() - began < 20
    monkeypatch.setattr(Store, "fault", None)
    assert is_whole(find_checkpoint(shaky.step(1)), 1)
    # A commit whose answer was lost is one.
    assert shaky.place().steps() == ([2, 1] if (operation, when) == ("mv", "after") else [1])
    save(shaky.name, 2, last=1)
    assert is_whole(find_checkpoint(shaky.name), 2) and folders(shaky.root) == ["step-2"]


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "The specified bucket does not exist")]
)
def test_what_is_not_allowed_or_not_there_is_said_at_once(
    shaky: Home, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    calls = 0

    def forbidden(when: str, operation: str, path: str) -> None:
        nonlocal calls
        if operation == "open":
            calls += 1
            raise error

    monkeypatch.setattr(Store, "fault", forbidden)
    with pytest.raises(UserError, match=f"{shaky.name}/step-2/rank-00000.safetensors"):
        save(shaky.name, 2)
    assert calls == 1
    monkeypatch.setattr(Store, "fault", None)
    assert is_whole(find_checkpoint(shaky.name), 1)


@pytest.mark.parametrize("operation", ["ls", "rm_file", "rm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_cannot_be_removed_stays_and_the_new_one_counts(
    shaky: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], operation: str, when: str
) -> None:
    """The new one is safe: training goes on."""
    committed = False

    def fault(now: str, called: str, path: str) -> None:
        nonlocal committed
        committed |= (now, called) == ("after", "pipe_file")
        if committed and (now, called) == (when, operation):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(Store, "fault", fault)
    save(shaky.name, 2, last=1)
    monkeypatch.setattr(Store, "fault", None)
    assert is_whole(find_checkpoint(shaky.name), 2)
    assert "cannot" in capsys.readouterr().err
    save(shaky.name, 3, last=1)
    shaky.place().clean()
    assert folders(shaky.root) == ["step-3"]


def test_a_listing_without_the_newest_removes_nothing(shaky: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some stores list what was just written a little later."""
    ls = Store.ls
    monkeypatch.setattr(Store, "ls", lambda *a, **o: [path for path in ls(*a, **o) if not path.endswith("step-2")])
    save(shaky.name, 2, last=1)
    monkeypatch.setattr(Store, "ls", ls)
    assert is_whole(find_checkpoint(shaky.name), 2)


def test_a_store_that_one_rank_does_not_reach_is_an_error_on_all(nursery: Nursery, shaky: Home) -> None:
    for who in (0, 2):
        seen = nursery.call(run_ranks, save_without, shaky, [who])
        assert len({error for error, _ in seen}) == 1
        assert seen[0][0].startswith(f"rank {who}: cannot write {shaky.name}/step-2/rank-0000{who}.safetensors: ")
        assert is_whole(find_checkpoint(shaky.name), 1)
        # Rank 0 removes what was begun, if it reaches the store.
        assert folders(shaky.root) == (["step-1", "step-2"] if who == 0 else ["step-1"])
        shaky.place().clean()
        assert folders(shaky.root) == ["step-1"]
    seen = nursery.call(run_ranks, save_without, shaky, [0, 1, 2])
    assert len({error for error, _ in seen}) == 1 and seen[0][0].startswith("rank 0: cannot write ")
    assert is_whole(find_checkpoint(shaky.name), 1)
    seen = nursery.call(run_ranks, save_without, shaky, [])
    assert seen[0][0] is None and is_whole(find_checkpoint(shaky.name), 2, ranks=RANKS)


def test_no_rank_waits_much_longer_than_others_for_a_store_that_stays_away(nursery: Nursery, shaky: Home) -> None:
    """They would wait for it in the next step of training."""
    seconds = [took for _, took in nursery.call(run_ranks, save_without, shaky, [0, 1, 2], 3.0)]
    assert max(seconds) - min(seconds) < 2


def save_without(axis: Axis, home: Home, cut_off: list[int], patience: float = 0.5) -> tuple[str | None, float]:
    """(what the error says, seconds) of a save in which the store does not answer some ranks after their first file was
    begun."""
    place = home.place()
    place._patience.total = patience  # type: ignore[attr-defined]

    def begun(when: str, operation: str, path: str) -> None:
        if operation == "open":
            Store.fault = away

    def away(when: str, operation: str, path: str) -> None:
        raise ConnectionError("no route to host")

    Store.fault = begun if axis.rank in cut_off else None
    began = time.monotonic()
    message = message_of(lambda: save(place, 2, axis=axis, last=1))
    took = time.monotonic() - began
    Store.fault = None
    return message, took


# ---- odd names


def test_a_place_may_be_written_with_a_slash_at_its_end(root: Path) -> None:
    for scheme in ("", "file://"):
        place = Place.of(f"{scheme}{root}/")
        assert place.steps() == [1] and is_whole(newest_checkpoint(place)[0], 1)
        assert is_whole(Checkpoint(f"{scheme}{root}/step-1/"), 1)


def test_names_that_only_look_like_steps_are_none(root: Path) -> None:
    """Whatever lies there is neither found nor removed."""
    odd = ["step-", "step--1", "step-1x", "step-1.bak", "xstep-1", "step-01", "step-٣"]
    for name in odd:
        shutil.copytree(root / "step-1", root / name)
    for scheme in ("", "file://"):
        place = Place.of(f"{scheme}{root}")
        assert place.steps() == [1]
        place.clean()
        assert set(folders(root)) == {"step-1", *odd}


def test_files_of_a_url_are_not_mapped_or_kept_open(remote: Home) -> None:
    checkpoint = Checkpoint(remote.step(1))
    before = len(os.listdir("/proc/self/fd"))
    assert checkpoint.verify() is None and is_whole(checkpoint, 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_of_a_folder_are_closed_with_their_checkpoint(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert is_whole(find_checkpoint(root), 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_saving_from_a_generator_that_runs_out_is_asked_again_from_memory(
    shaky: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fragments may come from an iterator, which a second attempt could not read again."""
    monkeypatch.setattr(
        Store, "fault", failing("close", "before", 2, ConnectionError("reset"), "rank-00000.safetensors")
    )

    save(shaky.name, 2, fragments=iter(cut(2, 1)[0]))
    assert is_whole(find_checkpoint(shaky.name), 2)

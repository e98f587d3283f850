"""What saving and reading cost: never a second copy of the state, and of what others hold, nothing is read.

Measured in processes of their own, by the kernel: the most memory that a process had, and the bytes it asked for."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megakrause.checkpoint.files import check_file
from megakrause.checkpoint.fragment import Box, Fragment
from megakrause.checkpoint.place import Place, open_folder
from megakrause.checkpoint.read import Checkpoint
from megakrause.checkpoint.saver import Saver
from megakrause.checkpoint.write import Retention, Snapshot, _rank_chunks, save_checkpoint
from megakrause.parallel.mesh import ALONE, Axis
from tests.checkpoint.processes import Nursery, run_alone
from tests.checkpoint.states import FILES, Home

MB = 1 << 20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
TENSOR = 24 * MB  # bytes of the largest
COUNT = 16  # of them
FEW = 40 * MB  # buffers: of chunks, of the hash, of Python
SCHEMES = pytest.mark.parametrize("scheme", ["", "file://"], ids=["folder", "url"])


@pytest.fixture
def quick_folder() -> Iterator[Path]:
    """In memory where there is enough: files there count to no process."""
    shared = os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 4 << 30
    with tempfile.TemporaryDirectory(dir="/dev/shm" if shared else None) as folder:
        yield Path(folder)


# ---- in the processes


def resident() -> int:
    """Bytes."""
    return _status("VmRSS")


def most_resident(work: Callable[[], Any]) -> int:
    """By how many bytes this process grows at most while it works. What it gives back goes back to the system."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MB)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def fragments(rank: int = 0, ranks: int = 1) -> list[Fragment]:
    """A part of COUNT parameters, each cut evenly over the ranks: 384 MiB in all."""
    numel = TENSOR // 4
    shape, share = (numel // 1024, 1024), numel // ranks
    return [
        Fragment(f"p{n}", "master", shape, (0, 0), shape, rank * share, torch.full((share,), n + rank / 8))
        for n in range(COUNT)
    ]


def snapshot_of(parts: list[Fragment]) -> Snapshot:
    return Snapshot(1, parts, {}, {}, FILES)


# ---- saving


@SCHEMES
def test_saving_holds_no_second_copy(nursery: Nursery, quick_folder: Path, scheme: str) -> None:
    grown = nursery.call(run_alone, growth_in_saving, Home(quick_folder, scheme))
    assert grown < TENSOR + 8 * MB, f"{grown / MB:.0f} MiB"


def growth_in_saving(home: Home) -> int:
    given, place = snapshot_of(fragments()), home.place()
    return most_resident(lambda: save_checkpoint(place, given, ALONE, Retention(1)))


@SCHEMES
def test_saving_beside_training_holds_one_copy_and_has_it_from_the_beginning(
    nursery: Nursery, quick_folder: Path, scheme: str
) -> None:
    reserved, saved, again = nursery.call(run_alone, growth_in_saving_beside, Home(quick_folder, scheme))
    assert COUNT * TENSOR <= reserved < COUNT * TENSOR + 8 * MB
    for grown in (saved, again):
        assert grown < TENSOR + 8 * MB, f"{grown / MB:.0f} MiB"


def growth_in_saving_beside(home: Home) -> list[int]:
    given = snapshot_of(fragments())
    saver = Saver(home.place(), ALONE, Retention(1), asynchronous=True)

    def save() -> None:
        saver.save(given)
        assert saver.wait() is None

    return [most_resident(lambda: saver.reserve(given.fragments)), most_resident(save), most_resident(save)]


# ---- reading


def save_as_ranks(root: Path, ranks: int) -> None:
    """A checkpoint of several ranks, made by one process after the other."""
    place, records = Place.of(root), []
    place.begin(1)
    for rank in range(ranks):
        parts = fragments(rank, ranks)
        chunks = lambda parts=parts: _rank_chunks(parts, Snapshot(1, parts, {}, {}, {}))  # noqa: E731
        records.append(place.write(1, f"rank-{rank:05d}.safetensors", chunks))
    for name, content in {"state.json": b'{"step": 1}', **FILES}.items():
        records.append(place.write(1, name, lambda content=content: iter([content])))  # type: ignore[misc]
    place.commit(1, json.dumps({"format": 1, "files": [record.to_json() for record in records]}).encode())


RANKS = 4


@SCHEMES
@pytest.mark.parametrize("ranks", [4, 2, 3, 8])
def test_a_rank_reads_its_ranges_and_little_else(nursery: Nursery, quick_folder: Path, scheme: str, ranks: int) -> None:
    nursery.call(run_alone, save_as_ranks, quick_folder, RANKS)
    for rank in {0, ranks // 2, ranks - 1}:
        wanted, read, grown = nursery.call(run_alone, read_share, Home(quick_folder, scheme), rank, ranks)
        assert abs(wanted - COUNT * TENSOR / ranks) <= 4 * COUNT
        assert wanted <= read < 1.01 * wanted + MB, f"{read / MB:.1f} of {wanted / MB:.1f} MiB"
        # A part, the one before, and what a store's answer comes in.
        assert grown < 3 * TENSOR / ranks + 8 * MB, f"{grown / MB:.1f} MiB"


def read_share(home: Home, rank: int, ranks: int) -> tuple[int, int, int]:
    """(bytes wanted, bytes read, bytes grown) of a rank that reads its part of every parameter, one after the other."""
    wanted, numel = 0, TENSOR // 4

    def read(count: int = COUNT) -> None:
        nonlocal wanted
        checkpoint = Checkpoint(home.step(1))
        for n in range(count):
            part = checkpoint.read(f"p{n}", "master", share.start, len(share))
            assert part[0] == n + share.start // (numel // RANKS) / 8
            assert part[-1] == n + (share.stop - 1) // (numel // RANKS) / 8
            wanted += part.nbytes

    share = range(8)
    read(1)  # what is called for the first time takes memory, too
    share, wanted, before = Axis(rank, ranks, None).share(numel), 0, bytes_read()
    grown = most_resident(read)
    return wanted, bytes_read() - before, grown


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_that_holds_a_slice_reads_it_alone(nursery: Nursery, quick_folder: Path, dim: int) -> None:
    """Rows lie together; of columns, the rows that hold them are read, a part of a parameter at a time."""
    nursery.call(run_alone, save_as_ranks, quick_folder, RANKS)
    wanted, read, grown = nursery.call(run_alone, read_slices, Home(quick_folder, ""), dim)
    assert read < (1.01 if dim == 0 else 4.01) * wanted + MB, f"{read / MB:.1f} of {wanted / MB:.1f} MiB"
    assert grown < 1.5 * TENSOR + 8 * MB, f"{grown / MB:.1f} MiB"


def read_slices(home: Home, dim: int) -> tuple[int, int, int]:
    rows, columns = TENSOR // 4 // 1024, 1024
    size = (rows // 4, columns) if dim == 0 else (rows, columns // 4)
    start = (rows // 4, 0) if dim == 0 else (0, columns // 4)
    box, wanted = Box((rows, columns), start, size), 0

    def read(numel: int = TENSOR // 16) -> None:
        nonlocal wanted
        checkpoint = Checkpoint(home.step(1))
        for n in range(COUNT):
            part = checkpoint.read(f"p{n}", "master", 0, numel, box)
            assert (part[0].item(), part[-1].item()) == (n + values[0], n + values[1])
            wanted += part.nbytes

    values = (1 / 8, 1 / 8) if dim == 0 else (0, 0)
    read(256)  # what is called for the first time takes memory, too
    values, wanted, before = (1 / 8, 1 / 8) if dim == 0 else (0, 3 / 8), 0, bytes_read()
    grown = most_resident(read)
    return wanted, bytes_read() - before, grown


@SCHEMES
def test_verifying_holds_little_and_reads_everything_once(nursery: Nursery, quick_folder: Path, scheme: str) -> None:
    nursery.call(run_alone, save_as_ranks, quick_folder, RANKS)
    size = sum(path.stat().st_size for path in (quick_folder / "step-1").iterdir())
    for rank in range(2):
        read, grown = nursery.call(run_alone, verify_share, Home(quick_folder, scheme), rank)
        assert size / 2 * 0.99 < read < size / 2 * 1.01 + MB
        assert grown < FEW, f"{grown / MB:.0f} MiB"


def verify_share(home: Home, rank: int) -> tuple[int, int]:
    checkpoint, before = Checkpoint(home.step(1)), bytes_read()

    def verify() -> None:
        large = [record for record in checkpoint.files if record.name.startswith("rank-")]
        for record in large[rank::2]:
            assert check_file(open_folder(checkpoint.path), record) is None

    grown = most_resident(verify)
    return bytes_read() - before, grown

"""`megakrause bench checkpoint`: saving and loading against what the same memory and disk do at best."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from megakrause.bench.measure import machine, write_json
from megakrause.checkpoint.files import CHUNK
from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.place import Place
from megakrause.checkpoint.read import newest_checkpoint
from megakrause.checkpoint.saver import Saver
from megakrause.checkpoint.write import Retention, Snapshot
from megakrause.errors import UserError
from megakrause.parallel.mesh import ALONE
from megakrause.table import table

KINDS = ("master", "exp_avg", "exp_avg_sq")
TENSORS = 24  # parameters that the state is of
ROUNDS = 8
CONFIG = b'output = "runs/x"\n'


def run(megabytes: int, folder: Path, json_path: Path | None) -> None:
    """Measures one rank's part of so many megabytes in a folder, checks what is read back, prints the table. Raises
    UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="megakrause-bench-", dir=folder) as name:
        rows = measure(State(megabytes), Path(name))
    print(f"{megabytes:,} MB of state, fsync included, nothing cached before reads, best of {ROUNDS}; {machine()}")
    print(table(rows))
    if json_path is not None:
        write_json(json_path, {"machine": machine(), "megabytes": megabytes, "rows": rows})


class State:
    """Weights and moments of random values, and memory of the same size."""

    def __init__(self, megabytes: int):
        numel = megabytes * 10**6 // (4 * len(KINDS) * TENSORS)
        generator = torch.Generator().manual_seed(0)
        self.fragments = [
            Fragment(f"layer-{n}", kind, (numel,), (0,), (numel,), 0, torch.randn(numel, generator=generator))
            for n in range(TENSORS)
            for kind in KINDS
        ]
        self.bytes = sum(f.tensor.nbytes for f in self.fragments)
        self.copies = [torch.zeros_like(f.tensor).fill_(1.0) for f in self.fragments]

    def snapshot(self, step: int) -> Snapshot:
        return Snapshot(step, self.fragments, {"cpu": torch.get_rng_state()}, {}, {"config.toml": CONFIG})

    def copy(self) -> None:
        for fragment, copy in zip(self.fragments, self.copies, strict=True):
            copy.copy_(fragment.tensor)


def measure(state: State, folder: Path) -> list[dict[str, Any]]:
    """Rows of the table. Two contestants take turns, and who is first, for the second may find the disk busy; the best
    counts, for a disk that others share is slow by chance and never fast."""
    place, beside = Place.of(folder / "checkpoints"), Place.of(folder / "beside")
    saver = Saver(place, ALONE, Retention(1), asynchronous=False)
    aside = Saver(beside, ALONE, Retention(1), asynchronous=True)
    aside.reserve(state.fragments)
    steps = iter(range(1, 10**6))

    def save(saver: Saver) -> None:
        saver.save(state.snapshot(next(steps)))

    rows = _pair("plain copy", state.copy, "asynchronous save, stall", lambda: save(aside), lambda: _check(aside))
    aside.place.remove(max(aside.place.steps()))
    plain = folder / "plain"
    rows += _pair(
        *("plain write", lambda: write_plainly(plain, state), "synchronous save", lambda: save(saver)),
        lambda: _check(saver),
    )
    check_load(place, state)
    rows += _pair(
        *("plain read", lambda: read_plainly(plain), "verified load", lambda: load(place, state)),
        lambda: forget(folder),
    )
    for row in rows:
        row["GB/s"] = state.bytes / row["s"] / 1e9
    return rows


def _pair(
    plain: str, do_plain: Callable[[], Any], ours: str, do_ours: Callable[[], Any], between: Callable[[], Any]
) -> list[dict[str, Any]]:
    """Rows of two contestants. between: what follows each turn and does not count."""
    contestants = {plain: do_plain, ours: do_ours}
    best, grown = dict.fromkeys(contestants, math.inf), dict.fromkeys(contestants, 0)
    for number in range(-1, ROUNDS):  # the first does not count
        for name, work in list(contestants.items())[:: 1 if number % 2 else -1]:
            with Peak() as peak:
                began = time.perf_counter()
                work()
                seconds = time.perf_counter() - began
            between()
            if number >= 0:
                best[name], grown[name] = min(best[name], seconds), max(grown[name], peak.grown)
    return [
        {"what": name, "s": best[name], "of plain": best[name] / best[plain], "more memory, MB": grown[name] / 1e6}
        for name in contestants
    ]


def write_plainly(path: Path, state: State) -> None:
    with open(path, "wb", buffering=0) as file:
        for fragment in state.fragments:
            view = memoryview(fragment.tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def load(place: Place, state: State) -> None:
    """As a resumed run does: everything is verified, and then read into memory that is there."""
    checkpoint, _ = newest_checkpoint(place)
    assert checkpoint is not None
    for fragment, copy in zip(state.fragments, state.copies, strict=True):
        checkpoint.read(fragment.name, fragment.kind, 0, len(copy), out=copy)


def check_load(place: Place, state: State) -> None:
    """Raises UserError when what is loaded is not what was saved."""
    for copy in state.copies:
        copy.zero_()
    load(place, state)
    for fragment, copy in zip(state.fragments, state.copies, strict=True):
        if not torch.equal(fragment.tensor, copy):
            raise UserError(f"{fragment.name} is not what was saved: nothing is shown")


def forget(folder: Path) -> None:
    """Drops what the kernel has cached of the files, all of which are on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Peak:
    """By how much this process's memory grew at most."""

    def __enter__(self) -> Peak:
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self._most - self._before


def _check(saver: Saver) -> None:
    if failure := saver.wait():
        raise failure

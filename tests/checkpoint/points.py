"""The moments of a save at which something can happen to it, called by name.

They are seen from outside: what changes the disk is wrapped, in the process that saves."""

from __future__ import annotations

import builtins
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Reached = Callable[[str], object]

OLD, NEW = "the old one", "the new one"


@dataclass(frozen=True)
class Point:
    """A moment in saving step 3."""

    name: str
    event: str  # as `watch` calls it; {rank} stands for who is there
    found: str  # which checkpoint a restart finds when the save ends here
    every_rank: bool = False  # else rank 0 alone gets there
    again: bool = False  # only when an earlier step 3, which does not verify, has to make room


FILE = "rank-0000{rank}.safetensors"

IN_FOLDER = [
    Point("before the folder is made", "before mkdir step-3.tmp", OLD),
    Point("the folder is made", "after mkdir step-3.tmp", OLD),
    Point("a rank's file is opened", f"after open {FILE}", OLD, every_rank=True),
    Point("its header is written", f"after write 1 of {FILE}", OLD, every_rank=True),
    Point("half of its tensors are written", f"amid write 4 of {FILE}", OLD, every_rank=True),
    Point("before it is flushed", f"before fsync {FILE}", OLD, every_rank=True),
    Point("it is flushed", f"after fsync {FILE}", OLD, every_rank=True),
    Point("state.json is half written", "amid write 1 of state.json", OLD),
    Point("state.json is written", "after fsync state.json", OLD),
    Point("the tokenizer is written", "after fsync tokenizer.model", OLD),
    Point("before COMMIT.json", "before open COMMIT.json", OLD),
    Point("COMMIT.json is empty", "after open COMMIT.json", OLD),
    Point("COMMIT.json is half written", "amid write 1 of COMMIT.json", OLD),
    Point("COMMIT.json is written, its folder not flushed", "before fsync step-3.tmp", OLD),
    Point("its folder is flushed", "after fsync step-3.tmp", OLD),
    Point("before the damaged one makes room", "before rename step-3", OLD, again=True),
    Point("the damaged one has made room", "after rename step-3", OLD, again=True),
    Point("before the rename", "before rename step-3.tmp", OLD),
    Point("after the rename, the parent not flushed", "before fsync checkpoints", NEW),
    Point("the parent is flushed", "after fsync checkpoints", NEW),
    Point("the damaged one is half removed", "after unlink 3 in step-3.bad.tmp", NEW, again=True),
    Point("before an outdated one is removed", "before rename step-2", NEW),
    Point("the outdated one is renamed", "after rename step-2", NEW),
    Point("the outdated one is half removed", "after unlink 3 in step-2.old.tmp", NEW),
    Point("the outdated one is empty", "before rmdir step-2.old.tmp", NEW),
    Point("the next outdated one is renamed", "after rename step-1", NEW),
]

AT_URL = [
    Point("the damaged one has no COMMIT.json", "after remove COMMIT.json in step-3", OLD, again=True),
    Point("the damaged one is half removed", "after unlink 3 in step-3", OLD, again=True),
    Point("before the folder is made", "before mkdir step-3", OLD),
    Point("the folder is made", "after mkdir step-3", OLD),
    Point("a rank's file is opened", f"after open {FILE}", OLD, every_rank=True),
    Point("its header is written", f"after write 1 of {FILE}", OLD, every_rank=True),
    Point("half of its tensors are written", f"amid write 4 of {FILE}", OLD, every_rank=True),
    Point("before it is closed", f"before close {FILE}", OLD, every_rank=True),
    Point("it is closed", f"after close {FILE}", OLD, every_rank=True),
    Point("state.json is half written", "amid write 1 of state.json", OLD),
    Point("the tokenizer is written", "after close tokenizer.model", OLD),
    Point("before COMMIT.json", "before open COMMIT.json.tmp", OLD),
    Point("COMMIT.json is empty", "after open COMMIT.json.tmp", OLD),
    Point("COMMIT.json is half written", "amid write 1 of COMMIT.json.tmp", OLD),
    Point("COMMIT.json is written", "after close COMMIT.json.tmp", OLD),
    Point("COMMIT.json has its name", "after rename COMMIT.json.tmp", NEW),
    Point("before an outdated one is removed", "before remove COMMIT.json in step-2", NEW),
    Point("the outdated one has no COMMIT.json", "after remove COMMIT.json in step-2", NEW),
    Point("the outdated one is half removed", "after unlink 3 in step-2", NEW),
    Point("the outdated one is empty", "before rmdir step-2", NEW),
    Point("the next outdated one has no COMMIT.json", "after remove COMMIT.json in step-1", NEW),
]


def watch(reached: Reached) -> None:
    """From now on `reached` is told, in this process, of every moment before, amid and after what changes the disk."""
    unlinked: Counter[str] = Counter()

    def around(module: Any, function: str, describe: Callable[..., str]) -> None:
        original = getattr(module, function)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            event = describe(*arguments, **options)
            reached(f"before {event}")
            result = original(*arguments, **options)
            reached(f"after {event}")
            return result

        setattr(module, function, wrapped)

    def unlink(path: Any, *, dir_fd: int | None = None) -> str:
        folder = os.path.basename(os.path.dirname(path) if dir_fd is None else path_of(dir_fd))
        unlinked[folder] += 1
        return f"unlink {unlinked[folder]} in {folder}"

    around(os, "mkdir", lambda path, *_, **__: f"mkdir {os.path.basename(path)}")
    around(os, "fsync", lambda descriptor: f"fsync {os.path.basename(path_of(descriptor))}")
    around(os, "rename", lambda source, *_, **__: f"rename {os.path.basename(source)}")
    around(os, "rmdir", lambda path, *_, **__: f"rmdir {os.path.basename(path)}")
    around(os, "unlink", unlink)
    around(os, "remove", lambda path: f"remove {os.path.basename(path)} in {os.path.basename(os.path.dirname(path))}")
    real_open = builtins.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "w" not in mode or "step-" not in str(file):
            return real_open(file, mode, *arguments, **options)
        name = os.path.basename(file)
        reached(f"before open {name}")
        result = _Watched(real_open(file, mode, *arguments, **options), name, reached)
        reached(f"after open {name}")
        return result

    builtins.open = opened


def path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


class _Watched:
    """A file that is being written, whose every write reaches the disk in two halves."""

    def __init__(self, file: Any, name: str, reached: Reached):
        self._file, self._name, self._reached, self._writes = file, name, reached, 0

    def write(self, data: Any) -> int:
        self._writes += 1
        half = len(data) // 2
        for part, when in ((data[:half], "amid"), (data[half:], "after")):
            while part:
                part = part[self._file.write(part) :]
            self._file.flush()
            self._reached(f"{when} write {self._writes} of {self._name}")
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *reason: Any) -> None:
        self._reached(f"before close {self._name}")
        self._file.__exit__(*reason)
        self._reached(f"after close {self._name}")

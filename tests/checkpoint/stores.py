"""Stores that fail: an fsspec file system of this machine's files, of which any call can go wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from megakrause.checkpoint import place
from megakrause.data.remote import Patience

Fault = Callable[[str, str, str], object]  # (when: "before" or "after", operation, path); raises what goes wrong

quick = partial(Patience, total=0.5, first=0.002, longest=0.02)


def be_impatient() -> None:
    """Lets this process give up on stores soon."""
    setattr(place, "Patience", quick)  # noqa: B010


class Store(LocalFileSystem):
    """store:///PATH"""

    protocol = "store"
    cachable = False
    # Set on the class: the product makes its own instances.
    fault: Fault | None = None
    counts = True  # whether a file's write returns how much it has taken

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(str(path).replace("store://", "file://", 1))

    def around(self, operation: str, path: str, work: Callable[[], Any]) -> Any:
        fault = type(self).fault
        if fault is not None:
            fault("before", operation, path)
        result = work()
        if fault is not None:
            fault("after", operation, path)
        return result

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.around("makedirs", path, lambda: super(Store, self).makedirs(path, exist_ok))

    def ls(self, path: str, *args: Any, **options: Any) -> Any:
        return self.around("ls", path, lambda: super(Store, self).ls(path, *args, **options))

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self.around("mv", path1, lambda: super(Store, self).mv(path1, path2, **options))

    def info(self, path: Any, **options: Any) -> Any:
        return self.around("info", str(path), lambda: super(Store, self).info(path, **options))

    def cat_file(self, path: str, *args: Any, **options: Any) -> Any:
        return self.around("cat_file", path, lambda: super(Store, self).cat_file(path, *args, **options))

    def pipe_file(self, path: str, *args: Any, **options: Any) -> Any:
        return self.around("pipe_file", path, lambda: super(Store, self).pipe_file(path, *args, **options))

    def rm_file(self, path: str) -> None:
        self.around("rm_file", path, lambda: super(Store, self).rm_file(path))

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self.around("rm", path, lambda: super(Store, self).rm(path, recursive, maxdepth))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        path = self._strip_protocol(path)
        return self.around("open", path, lambda: (_Written if "w" in mode else LocalFileOpener)(path, mode, fs=self))


class _Written(LocalFileOpener):
    def write(self, data: Any) -> Any:
        count = self.fs.around("write", self.path, lambda: super(_Written, self).write(data))
        return count if self.fs.counts else None

    def __exit__(self, *reason: Any) -> None:
        self.fs.around("close", self.path, lambda: super(_Written, self).__exit__(*reason))


fsspec.register_implementation("store", Store, clobber=True)


def failing(operation: str, when: str, times: float, error: Exception, name: str = "") -> Fault:
    """Fails the first `times` calls of an operation on paths that end in `name`."""
    left = times

    def fault(now: str, called: str, path: str) -> None:
        nonlocal left
        if (now, called) == (when, operation) and str(path).endswith(name) and left > 0:
            left -= 1
            raise error

    return fault

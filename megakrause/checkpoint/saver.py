"""Saves while training stands still, or from a copy of its state while it goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace

import torch

from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.place import Place
from megakrause.checkpoint.write import Retention, Snapshot, save_checkpoint
from megakrause.errors import UserError
from megakrause.parallel.mesh import Axis


class Saver:
    """Writes the checkpoints of a run, one at a time. Every rank has one and calls it alike.

    Asynchronously, `save` returns when this rank's state is copied to host memory of its own (as much again as the
    rank's part of weights and optimizer state, pinned where there is a GPU); a thread writes the copy. The ranks'
    threads agree among themselves, over a process group that nothing else may use."""

    def __init__(self, place: Place, axis: Axis, retention: Retention, *, asynchronous: bool):
        self.place, self._axis, self._retention, self._asynchronous = place, axis, retention, asynchronous
        self._buffers: dict[tuple[str, str, int, int], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Allocates what copies of such fragments need, so that the first save is not slower than others."""
        if self._asynchronous:
            for fragment in fragments:
                self._buffer(fragment)

    def save(self, snapshot: Snapshot) -> float:
        """Writes a checkpoint, or begins to. Waits for an earlier one, whose failure has to have been taken from
        `wait`. Returns the seconds for which training stood still."""
        began = time.perf_counter()
        self._join()
        if self._asynchronous:
            snapshot = self._copy(snapshot)
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(snapshot)
        return time.perf_counter() - began

    @property
    def has_failed(self) -> bool:
        """Whether the last save has failed, as far as this rank knows by now."""
        return self._failure is not None

    def wait(self) -> UserError | None:
        """Waits for the end of what was begun, and returns why it failed, once and the same on every rank. Raises what
        is no UserError."""
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        return failure

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            save_checkpoint(self.place, snapshot, self._axis, self._retention)
        except Exception as error:  # of a thread, it would be lost
            self._failure = error

    def _copy(self, snapshot: Snapshot) -> Snapshot:
        """The same from now on, whatever becomes of what it was made of."""
        fragments: Iterable[Fragment]
        try:
            fragments = list(self._copies(snapshot.fragments))
        except Exception as error:  # which all ranks have to learn of while they write
            fragments = _raising(error)
        rng = {name: value.clone() for name, value in snapshot.rng.items()}
        return replace(
            snapshot, fragments=fragments, rng=rng, state=deepcopy(snapshot.state), files=dict(snapshot.files)
        )

    def _copies(self, fragments: Iterable[Fragment]) -> Iterator[Fragment]:
        on_device = False
        for fragment in fragments:
            buffer = self._buffer(fragment)
            buffer.copy_(fragment.tensor, non_blocking=True)
            on_device |= fragment.tensor.is_cuda
            yield replace(fragment, tensor=buffer)
        if on_device:
            torch.cuda.synchronize()

    def _buffer(self, fragment: Fragment) -> torch.Tensor:
        key = fragment.name, fragment.kind, fragment.offset, len(fragment.tensor)
        if key not in self._buffers:
            like = fragment.tensor
            self._buffers[key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())
            self._buffers[key].zero_()  # memory is only handed out when it is first written to
        return self._buffers[key]


def _raising(error: Exception) -> Iterator[Fragment]:
    raise error
    yield

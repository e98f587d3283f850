"""Who is to blame when ranks wait for one another in vain: one message that names the rank and the step.

Every rank beats once a second in the launcher's store. Whoever sees the end coming (a collective that fails, SIGTERM
from a launcher that lost a rank, no progress for `timeout` seconds) looks who has stopped beating. A rank that beats
but is stuck outside of communication finds that out itself and says where. The first to know says so, and its process
ends; the launcher ends the others. When there is no progress, all write down what they were doing before.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from megakrause.parallel.mesh import Axis

BEAT = 1.0  # seconds between beats
SLOWEST = 2 * 3600.0  # seconds that a checkpoint may take to be written or read
PATIENCE = 4.0  # seconds without a beat after which a rank is gone
WAITING = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")  # in whose code
MESH = f"{os.sep}megakrause{os.sep}parallel{os.sep}mesh.py"  # which waits for what it has sent and wants to receive


class Watch:
    """Watches over the ranks of `world`, while it is open; alone, nothing."""

    def __init__(self, world: Axis, timeout: float, step: int, stacks: Path):
        """timeout: seconds without progress after which this process ends. stacks: folder for what the ranks were doing
        then."""
        self._world, self._timeout, self._step, self._since = world, timeout, step, time.monotonic()
        self._allowed, self._stacks, self._dumped = timeout, stacks, False
        self._closed, self._telling = threading.Event(), threading.Lock()
        self._store: Any = None
        if world.size == 1 or "MASTER_ADDR" not in os.environ:
            return
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=20))
        # A job that its launcher started again begins anew.
        attempt = world.gather_objects(time.time_ns())[0]
        self._store = PrefixStore(f"megakrause/watch/{attempt}", store)
        self._beats = 0
        self._beat()
        world.gather_objects(None)  # from here on all have beaten
        self._main = threading.main_thread().ident
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        self._old_wake = signal.set_wakeup_fd(wake)
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def progress(self, step: int) -> None:
        """Something was done; this process is in `step` now."""
        self._step, self._since = step, time.monotonic()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """While it is open, what is done may take hours, as a large checkpoint on a slow disk does."""
        self._allowed = SLOWEST
        try:
            yield
        finally:
            self.progress(self._step)
            self._allowed = self._timeout

    def told(self) -> None:
        """This process ends and says why: the others need not look for who is gone."""
        if self._store is not None:
            with suppress(RuntimeError, dist.DistError):
                self._store.add("told", 1)

    def blame(self) -> bool:
        """Looks whether somebody is gone, and says who, if no other rank has said it."""
        with self._telling:
            gone = self._gone() if self._store is not None else ""
            if gone:
                self._say(gone)
        return bool(gone)

    def finish(self) -> None:
        """All is done here, so that nobody has to miss this process."""
        if self._store is not None:
            self._store.set(f"finished/{self._world.rank}", "1")

    def close(self) -> None:
        if self._store is not None and not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            signal.set_wakeup_fd(self._old_wake)

    def _watch(self) -> None:
        try:
            while not self._closed.is_set():
                self._beat()
                woken = select.select([self._woken], [], [], BEAT)[0]
                # SIGTERM may be from a launcher that lost a rank; else it is a request, which the main thread sees to.
                if woken and signal.SIGTERM in os.read(self._woken, 64) and self.blame():
                    os._exit(128 + signal.SIGTERM)
                if time.monotonic() - self._since > self._allowed:
                    self._store.set("hung", "1")
                    self._dump()
                    with self._telling:
                        message = self._gone() or self._stuck()
                        message = message or f"no progress in step {self._step}, but every rank is alive"
                        self._say(f"{message}; what the ranks were doing is in {self._stacks}")
                    time.sleep(2 * BEAT)  # for the others to write theirs
                    os._exit(1)
                if self._store.check(["hung"]):
                    self._dump()
        except (RuntimeError, dist.DistError):  # the store is gone, and with it the process that held it
            if not self._closed.is_set():
                where = os.environ["MASTER_ADDR"]
                print(f"\nerror: step {self._step}: lost the process at {where} that all met at", file=sys.stderr)
                os._exit(1)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(str(self._world.rank), str(self._beats))

    def _read(self) -> list[int]:
        """How often every rank has beaten."""
        return [int(self._store.get(str(rank))) for rank in range(self._world.size)]

    def _gone(self) -> str:
        """The ranks that do not beat any more, in words; empty if all do."""
        before, ends = self._read(), time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            time.sleep(BEAT / 2)
            self._beat()  # the thread that does may wait for this one, and others look at it
            now = self._read()
            still = [
                str(rank)
                for rank, (old, new) in enumerate(zip(before, now, strict=True))
                if new == old and not self._store.check([f"finished/{rank}"])
            ]
            if not still:
                return ""
        return f"rank {' and '.join(still)} is gone or stopped, in step {self._step}"

    def _stuck(self) -> str:
        """Where this process's main thread is, unless it waits for others. (On a GPU, whoever waits for others waits in
        any line that wants a number from it.)"""
        assert self._main is not None
        if torch.cuda.is_available():
            return ""
        frame: FrameType | None = sys._current_frames().get(self._main)
        frames = traceback.extract_stack(frame) if frame is not None else []
        waits = any(part in entry.filename for part in WAITING for entry in frames)
        if not frames or waits or frames[-1].filename.endswith(MESH):
            time.sleep(2 * PATIENCE)  # for the one that is stuck to say so
            return ""
        where = frames[-1]
        return f"rank {self._world.rank} is stuck in step {self._step}, at {where.filename}:{where.lineno}"

    def _dump(self) -> None:
        """Writes what every thread of this process is doing to a file of its own, once."""
        if not self._dumped:
            self._dumped = True
            with suppress(OSError):  # a folder that hangs or is full must not hide the rest
                self._stacks.mkdir(parents=True, exist_ok=True)
                with open(self._stacks / f"rank-{self._world.rank:05d}.txt", "w") as file:
                    print(f"rank {self._world.rank}, step {self._step}, {time.ctime()}", file=file, flush=True)
                    faulthandler.dump_traceback(file)

    def _say(self, message: str) -> None:
        if self._store.add("told", 1) == 1:
            message = f"{message}; the job ends, the same command goes on from the last checkpoint"
            print(f"\nerror: {message}", file=sys.stderr, flush=True)

"""One run at a time in an output folder, on whatever hosts."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from megakrause.errors import UserError

NAME = ".lock"
BEAT = 10.0  # seconds between signs of life
STALE = 35.0  # seconds without one after which a run on another host is dead


class OutputLock:
    """Holds a folder until `close` or the end of the process, however it ends.

    The kernel's lock tells runs on one host apart, at once. Not every shared file system carries it from host to host,
    so the file also says who holds it, and is touched as a sign of life."""

    def __init__(self, folder: Path):
        """Raises UserError when another run holds it, and OSError when it cannot be written to."""
        self._path = folder / NAME
        self._file = open(self._path, "a+")  # noqa: SIM115  held until the process ends
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._taken(folder) from error
        if self._holder().get("host", me()) != me() and self._is_alive():
            raise self._taken(folder)
        self._file.truncate(0)
        self._claim = {"host": me(), "pid": os.getpid(), "claim": uuid.uuid4().hex}
        self._file.write(json.dumps(self._claim) + "\n")
        self._file.flush()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        if not self._file.closed:
            if self._holder() == self._claim:
                self._file.truncate(0)  # nobody has to wait for signs of life
            self._file.close()

    def _holder(self) -> dict[str, str | int]:
        """What the file says of who holds it; empty: nobody does."""
        try:
            self._file.seek(0)
            holder: dict[str, str | int] = json.loads(self._file.read() or "{}")
            return holder
        except ValueError:  # cut short, by a host that died
            return {}

    def _is_alive(self) -> bool:
        """Whether a holder on another host gives a sign of life, as its file server's clock has it."""
        seen, waited = self._path.stat().st_mtime_ns, 0.0
        probe = self._path.with_name(f"{NAME}.{me()}.{os.getpid()}")
        probe.touch()
        age = (probe.stat().st_mtime_ns - seen) / 1e9
        probe.unlink()
        if age < STALE:
            holder = self._holder()
            print(
                f"{self._path} is of {holder['host']}: waiting {STALE - age:.0f} s for a sign of life", file=sys.stderr
            )
        while waited + age < STALE:
            time.sleep(1)
            waited += 1
            if self._path.stat().st_mtime_ns != seen:
                return True
        return False

    def _taken(self, folder: Path) -> UserError:
        holder = self._holder()
        who = f", process {holder['pid']} on {holder['host']}," if holder else ""
        return UserError(f"another run{who} is writing to {folder}; wait for it, or choose another output")

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            try:
                holder = json.loads(self._path.read_text() or "{}")
                if holder.get("claim", self._claim["claim"]) != self._claim["claim"]:
                    # Without a sign of life for so long, this run was taken for dead.
                    where = f"{self._path.parent}: process {holder.get('pid')} on {holder.get('host')} has it now"
                    print(f"\nerror: this run has lost {where}; it ends", file=sys.stderr, flush=True)
                    os._exit(1)
                os.utime(self._path)
            except ValueError:
                continue  # being written
            except OSError as error:  # the run itself finds out whether it can still write
                print(f"cannot touch {self._path}: {error.strerror}", file=sys.stderr)


def me() -> str:
    """This host's name."""
    return socket.gethostname()

"""Processes of their own, for what one process cannot show: kills, limits of the system, several ranks.

They start slowly, and a process with threads cannot be forked; so one that has imported everything and has no threads
is started once, the nursery, and forks all others."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megakrause.parallel.mesh import Axis
from tests.checkpoint.stores import be_impatient

RANKS = 3
LIMIT = 120  # seconds that a process may take
GLOO = timedelta(seconds=30)  # that a rank waits for another


class Nursery:
    """Calls functions in a process that can be forked."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))  # no daemon: it has children
        self._process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What it returns there. Raises AssertionError with its traceback."""
        self._pipe.send((function, arguments))
        result, problem = self._pipe.recv()
        assert problem is None, problem
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    be_impatient()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


# ---- in the nursery


def fork(work: Callable[[], None]) -> int:
    """Runs work in a copy of this process and gives its pid. It ends with status 0, or 1 after an exception."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(LIMIT)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def wait(pid: int) -> bool:
    """Whether the process was killed. Raises when it failed otherwise."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a process ended with status {status}")
    return status != 0


def wait_all(pids: list[int], seconds: float) -> dict[int, int]:
    """The exit statuses, by pid, of those that end in time; negative for a signal."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(ended) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - set(ended):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return ended


def run_alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What work(*arguments) returns in a process of its own. Raises RuntimeError with its traceback."""
    return _run(1, work, arguments)[0]


def run_ranks(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What work(axis, *arguments) returns on each rank of several."""
    return _run(RANKS, work, arguments)


def _run(size: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
    folder = Path(tempfile.mkdtemp(prefix="megakrause-ranks-"))

    def report(rank: int) -> None:
        outcome: tuple[Any, str | None]
        try:
            axis = () if size == 1 else (join(folder / "store", rank),)
            outcome = work(*axis, *arguments), None
        except BaseException:
            outcome = None, traceback.format_exc()
        (folder / f"{rank}").write_bytes(pickle.dumps(outcome))

    pids = [fork(lambda rank=rank: report(rank)) for rank in range(size)]  # type: ignore[misc]
    try:
        statuses = wait_all(pids, LIMIT)
        for pid in set(pids) - set(statuses):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        results = []
        for rank, pid in enumerate(pids):
            if statuses.get(pid) != 0:
                raise RuntimeError(f"rank {rank} of {size} ended with status {statuses.get(pid)}")
            result, problem = pickle.loads((folder / f"{rank}").read_bytes())
            if problem:
                raise RuntimeError(f"rank {rank} of {size}:\n{problem}")
            results.append(result)
        return results
    finally:
        shutil.rmtree(folder)


def join(store: Path, rank: int) -> Axis:
    """The axis of RANKS processes."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=GLOO)
    return Axis(rank, RANKS, dist.group.WORLD)


# ---- in the processes


def limit_file_size(size: int) -> None:
    """Longer files cannot be written by this process: the disk is full. Messages go nowhere; they may be in a file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


FULL = ": File too large"  # what the kernel then says

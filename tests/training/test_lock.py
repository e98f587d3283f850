"""One run in an output folder, on this host or on another that shares the folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megakrause.errors import UserError
from megakrause.training import lock
from megakrause.training.lock import OutputLock
from tests.disks import needs_root

pytestmark = pytest.mark.faults

ELSEWHERE = {"host": "elsewhere", "pid": 7}

# A run on another host: its own host name, and an output that the kernel's locks do not reach.
HOLD = """
import sys, time
from pathlib import Path
from megakrause.training import lock
lock.BEAT = 0.2
lock.fcntl.flock = lambda *_: None
held = lock.OutputLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "STALE", 3.0)


def test_a_second_lock_on_one_host_is_refused_and_names_the_first(tmp_path: Path) -> None:
    held = OutputLock(tmp_path)
    with pytest.raises(UserError, match=f"another run, process {os.getpid()} on {lock.me()}, is writing to {tmp_path}"):
        OutputLock(tmp_path)
    held.close()
    OutputLock(tmp_path).close()


@needs_root
def test_a_run_on_another_host_is_found_alive_and_its_death_is_noticed(tmp_path: Path) -> None:
    command = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$0" "$@"']
    other = subprocess.Popen([*command, sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"another run, process .* on elsewhere, is writing to {tmp_path}"):
        OutputLock(tmp_path)
    other.kill()
    other.wait()
    began = time.monotonic()
    OutputLock(tmp_path).close()
    assert time.monotonic() - began < lock.STALE + 2


def pretend(folder: Path, age: float, content: str = json.dumps(ELSEWHERE)) -> None:
    path = folder / lock.NAME
    path.write_text(content)
    os.utime(path, (time.time() - age,) * 2)


@pytest.mark.parametrize(
    ("leave", "seconds"),
    [
        (lambda folder: pretend(folder, 100), 0.5),  # its last sign of life is old
        (lambda folder: pretend(folder, 100, '{"host": "elsew'), 0.5),  # the host died while it wrote
        (lambda folder: OutputLock(folder).close(), 0.5),  # ended well
    ],
)
def test_what_dead_runs_left_costs_no_time(tmp_path: Path, leave: Callable[[Path], None], seconds: float) -> None:
    leave(tmp_path)
    began = time.monotonic()
    held = OutputLock(tmp_path)
    assert time.monotonic() - began < seconds
    claim = json.loads((tmp_path / lock.NAME).read_text())
    assert (claim["host"], claim["pid"]) == (lock.me(), os.getpid())
    held.close()
    assert os.listdir(tmp_path) == [lock.NAME]


def test_a_folder_that_goes_away_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    held = OutputLock(folder)
    shutil.rmtree(folder)
    time.sleep(3 * lock.BEAT)
    assert f"cannot touch {folder}" in capsys.readouterr().err
    held.close()


def test_a_run_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    held = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=-1, text=True)
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    (tmp_path / lock.NAME).write_text(json.dumps(ELSEWHERE | {"claim": "another"}))
    _, said = held.communicate(timeout=10)
    assert held.returncode == 1
    assert f"error: this run has lost {tmp_path}: process 7 on elsewhere has it now; it ends" in said
    assert json.loads((tmp_path / lock.NAME).read_text()) == ELSEWHERE | {"claim": "another"}

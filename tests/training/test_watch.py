"""A rank that dies or hangs ends the whole job, soon, with one message that names it and the step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megakrause.checkpoint.read import Checkpoint
from tests.training.runs import rows

pytestmark = pytest.mark.faults

TIMEOUT = 8  # parallel.timeout of these runs


def start(config: Path, output: Path, *overrides: str, prelude: str = "") -> subprocess.Popen[str]:
    """Two ranks that train until something happens. prelude: Python that each runs before."""
    script = f"import os, sys\n{prelude}\nfrom megakrause.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    (config.parent / "script.py").write_text(script)
    arguments = ["train", str(config), f"output={output}", "train.steps=100000", "checkpoint.every=5"]
    arguments += [f"parallel.timeout={TIMEOUT}", "log.tensorboard=false", *overrides]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    return subprocess.Popen(
        [*launcher, str(config.parent / "script.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def ranks(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    children = psutil.Process(launcher.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "script.py" in " ".join(child.cmdline())}


def wait_for_steps(launcher: subprocess.Popen[str], output: Path, count: int) -> None:
    deadline = time.monotonic() + 180
    while not (output / "metrics.jsonl").exists() or len((output / "metrics.jsonl").read_text().splitlines()) < count:
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()[1]
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("what", "layout", "within"),
    [
        pytest.param(signal.SIGKILL, "parallel.zero=1", 30, marks=pytest.mark.slow),
        (signal.SIGKILL, "parallel.pp=2", 30),
        # Stopped processes cannot end by SIGTERM, and torchrun gives them 30 s.
        pytest.param(signal.SIGSTOP, "parallel.tp=2", TIMEOUT + 30 + 30, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "parallel.cp=2", TIMEOUT + 30 + 30, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_gone_or_stopped_is_named(
    config: Path, tmp_path: Path, what: signal.Signals, layout: str, within: float
) -> None:
    output = tmp_path / "run"
    launcher = start(config, output, layout)
    wait_for_steps(launcher, output, 7)
    processes = ranks(launcher)
    began = time.monotonic()
    processes[1].send_signal(what)
    _, said = launcher.communicate(timeout=within + 60)
    assert time.monotonic() - began < within
    assert launcher.returncode != 0
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    match = re.fullmatch(r"error: rank 1 is gone or stopped, in step (\d+);(.*) the job ends, the same .*", errors[0])
    assert match is not None, errors
    if what == signal.SIGSTOP:  # it cannot say what it was doing
        assert f" what the ranks were doing is in {output}/stacks;" in match[2]
        assert os.listdir(output / "stacks") == ["rank-00000.txt"]
    assert abs(int(match[1]) - len(rows(output))) <= 1
    assert not any(process.is_running() for process in processes.values())
    folders = [path for path in (output / "checkpoints").iterdir() if not path.name.endswith(".tmp")]
    assert folders and all(Checkpoint(folder).verify() is None for folder in folders)


def test_a_rank_that_is_stuck_says_where(config: Path, tmp_path: Path) -> None:
    prelude = """
if os.environ["RANK"] == "1":
    import time
    from megakrause.data.mixed import MixedWindows
    real, calls = MixedWindows.batch, []
    def slow(self, indices):
        calls.append(1)
        if len(calls) > 6:
            time.sleep(1000)
        return real(self, indices)
    MixedWindows.batch = slow
"""
    output = tmp_path / "run"
    launcher = start(config, output, "data.prefetch=0", prelude=prelude)
    _, said = launcher.communicate(timeout=200)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert launcher.returncode != 0 and len(errors) == 1, said
    assert re.match(r"error: rank 1 is stuck in step 7, at \S+script.py:\d+;", errors[0]), errors
    # What every rank was doing: one sleeps, the other waits for it.
    assert f"what the ranks were doing is in {output}/stacks" in errors[0]
    stacks = [(output / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert all(f"rank {rank}, step 7, " in text for rank, text in enumerate(stacks))
    assert "script.py" in stacks[1].split("train_step")[0] and "distributed_c10d.py" in stacks[0]


def test_ranks_do_not_outlive_a_launcher_that_dies_before_they_have_met(config: Path, tmp_path: Path) -> None:
    """One waits for the other, which comes late."""
    prelude = f"""
from megakrause.parallel import mesh
real = mesh.dist.init_process_group
def late(*arguments, **options):
    open({str(tmp_path)!r} + "/rank-" + os.environ["RANK"], "w").close()
    if os.environ["RANK"] == "1":
        import time
        time.sleep(1000)
    real(*arguments, **options)
mesh.dist.init_process_group = late
"""
    launcher = start(config, tmp_path / "run", prelude=prelude)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"rank-{rank}").exists() for rank in range(2)):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)  # rank 0 is waiting
    processes = ranks(launcher)
    launcher.kill()
    gone, alive = psutil.wait_procs(processes.values(), timeout=10)
    for process in alive:
        process.kill()
    assert len(gone) == 2

"""The scripts in launch/ train like one process, and go on by themselves when something is killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from tests.training.conftest import CONFIG
from tests.training.runs import losses, rows, state, train

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
STEPS = 60
EVERY = ("checkpoint.every=20", "checkpoint.keep=9")
LIMIT = 300  # seconds for whatever is waited for

# The recipe's part of Slurm, with every node on this machine.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys

command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
nodes = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(node)}})
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]
# Slurm's own hands on most signals, and makes SIGKILL of SIGTERM.
signal.signal(signal.SIGTERM, lambda *_: [node.kill() for node in nodes])
signal.signal(signal.SIGUSR1, lambda *_: [node.send_signal(signal.SIGUSR1) for node in nodes])
sys.exit(max(node.wait() for node in nodes))
"""
SCONTROL = """#!/bin/sh
echo "$@" >>"$SCONTROL_LOG"
"""


Victim = Callable[[list[str], dict[str, str]], bool]  # of a process's command line and environment


@dataclass
class Job:
    """A script that runs, and everything that it started."""

    script: subprocess.Popen[bytes]
    log: Path
    mark: str

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def status(self) -> int:
        """Its exit status, once it is there."""
        try:
            return self.script.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.printed) from None

    def finish(self) -> str:
        """What it printed, after it came to a good end."""
        assert self.status() == 0, self.printed
        return self.printed

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that comes while the script runs."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.script.poll() is None and time.monotonic() < deadline, self.printed
            time.sleep(0.002)

    def wait_for(self, path: Path) -> None:
        self.wait_until(path.exists)

    def processes(self) -> list[tuple[psutil.Process, list[str], dict[str, str]]]:
        """Those alive, also ones whose parents are gone, with command line and environment."""
        found = []
        for process in psutil.process_iter():
            try:
                command, environment = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if environment.get("TEST_LAUNCH") == self.mark:
                found.append((process, command, environment))
        return found

    def find(self, is_meant: Victim) -> psutil.Process:
        """The one process that is meant, once it is there. Looking takes a while: it is done before it matters."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = [p for p, command, environment in self.processes() if is_meant(command, environment)]
            return len(found) == 1

        self.wait_until(is_there)
        return found[0]

    def kill(self) -> None:
        while alive := self.processes():
            for process, _, _ in alive:
                process.kill()
            time.sleep(0.05)
        self.script.wait()


class Launcher:
    """Starts scripts of launch/ and ends whatever a test leaves."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.jobs: list[Job] = []

    def __call__(self, script: str, *arguments: object, prefix: tuple[str, ...] = (), **environment: object) -> Job:
        job = Job(None, self.folder / f"{len(self.jobs)}.log", str(uuid.uuid4()))  # type: ignore[arg-type]
        variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TEST_LAUNCH": job.mark}
        variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        variables |= {"NPROC_PER_NODE": "2", "RETRY_SECONDS": "1"}
        if script == "slurm.sbatch":
            prefix = ("bash",)
            variables |= self._slurm()
        elif "NNODES" not in environment:
            variables["MASTER_PORT"] = str(free_port())
        variables |= {name: str(value) for name, value in environment.items()}
        command = [*prefix, str(ROOT / "launch" / script), *map(str, arguments)]
        with open(job.log, "wb") as log:
            job.script = subprocess.Popen(
                command,
                env=os.environ | variables,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Tests that run in the background of a shell hand down that SIGINT is ignored, for good.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
        self.jobs.append(job)
        return job

    def _slurm(self) -> dict[str, str]:
        """A job of two nodes."""
        commands = self.folder / "slurm"
        commands.mkdir(exist_ok=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        return {
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SCONTROL_LOG": str(commands / "log"),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURMD_NODENAME": "localhost",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "NPROC_PER_NODE": "1",
        }

    def close(self) -> None:
        for job in self.jobs:
            job.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.toml, for runs that several tests look at."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "config.toml").write_text(CONFIG.format(data=corpus, folder=folder))
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """The run of one process."""
    train(folder / "config.toml", f"train.steps={STEPS}", f"output={folder / 'one'}")
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Path]:
    """The undisturbed run of two processes."""
    launcher = Launcher(folder)
    launcher("torchrun.sh", folder / "config.toml", f"train.steps={STEPS}", f"output={folder / 'two'}").finish()
    yield folder / "two"
    launcher.close()


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Bit for bit."""
    assert [row["step"] for row in rows(ours)] == list(range(1, STEPS + 1))
    assert losses(ours) == losses(theirs)
    weights, expected = state(ours), state(theirs)
    assert weights.keys() == expected.keys()
    for key in weights:
        assert torch.equal(weights[key], expected[key]), key


def test_torchrun_gives_the_losses_of_one_process(one: Path, two: Path) -> None:
    assert len(losses(two)) == STEPS
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(two) != losses(one)  # there were two


@pytest.mark.slow
@pytest.mark.parametrize("script", ["deepspeed.sh", "slurm.sbatch"])
def test_other_launchers_give_the_losses_of_one_process(
    launch: Launcher, script: str, config: Path, tmp_path: Path, one: Path
) -> None:
    printed = launch(script, config, f"train.steps={STEPS}").finish()
    assert "on 2 x cpu" in printed
    assert losses(tmp_path / "run") == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_bad_config_is_refused_before_anything_starts(launch: Launcher, script: str, config: Path) -> None:
    job = launch(script, config, "train.stepz=5")
    assert job.status() == 1
    assert re.fullmatch(r"error: .*train\.stepz.*\n", job.printed), job.printed


@pytest.mark.slow
def test_what_only_people_can_mend_is_tried_twice(launch: Launcher, config: Path, tmp_path: Path) -> None:
    job = launch("torchrun.sh", config, f"data.train={tmp_path / 'nowhere'}", NPROC_PER_NODE=1, RETRIES=1000)
    assert job.status() == 1
    assert len(re.findall("^error: .*nowhere", job.printed, re.MULTILINE)) == 2, job.printed
    assert job.printed.count("start 1 of 1000") == 1 and "start 2 of 1000" not in job.printed
    assert "given up" in job.printed


def test_start_that_fails_is_repeated_so_often_and_no_more(launch: Launcher, config: Path) -> None:
    with socket.socket() as other:  # which has the port of the rendezvous
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = {"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": other.getsockname()[1]}
        job = launch("torchrun.sh", config, RETRIES=2, **place)
        assert job.status() == 1
    assert re.findall("start . of 2", job.printed) == ["start 1 of 2", "start 2 of 2"], job.printed
    assert "given up: 3 failures" in job.printed


def is_rank(command: list[str], environment: dict[str, str]) -> bool:
    return environment.get("RANK") == "1"


def is_first_rank(command: list[str], environment: dict[str, str]) -> bool:
    return environment.get("RANK") == "0"


def is_launcher(command: list[str], environment: dict[str, str]) -> bool:
    return "RANK" not in environment and len(command) > 1 and command[1].endswith("/bin/torchrun")


def is_helper(command: list[str], environment: dict[str, str]) -> bool:
    return "RANK" not in environment and "deepspeed.launcher.launch" in command


@pytest.mark.parametrize(
    ("script", "is_victim"),
    [
        ("torchrun.sh", is_rank),
        pytest.param("deepspeed.sh", is_helper, marks=pytest.mark.slow),
        pytest.param("deepspeed.sh", is_rank, marks=pytest.mark.slow),
    ],
)
def test_killed_process_is_replaced(
    launch: Launcher, script: str, is_victim: Victim, config: Path, tmp_path: Path, two: Path
) -> None:
    output = tmp_path / "run"
    job = launch(script, config, f"train.steps={STEPS}", *EVERY, GRACE_SECONDS=3)
    victim = job.find(is_victim)
    # Ranks go on without deepspeed's helper, and would be done before anybody looks.
    held = [job.find(is_first_rank), job.find(is_rank)] if is_victim is is_helper else []
    job.wait_for(output / "checkpoints" / "step-20")
    for rank in held:
        rank.suspend()
    victim.kill()
    printed = job.finish()
    assert printed.count("start 1 of 10") == 1 and "resuming from" in printed
    assert_same_run(output, two)


@pytest.mark.slow
def test_what_outlives_its_launcher_is_ended(launch: Launcher, config: Path, tmp_path: Path, two: Path) -> None:
    """Nobody could go on while the first rank has the output folder."""
    job = launch("torchrun.sh", config, f"train.steps={STEPS}", *EVERY, GRACE_SECONDS=3)
    rank, launcher = job.find(is_first_rank), job.find(is_launcher)
    job.wait_for(tmp_path / "run" / "checkpoints" / "step-20")
    rank.suspend()  # it cannot end itself
    launcher.kill()
    printed = job.finish()
    assert printed.count("start 1 of 10") == 1 and "resuming from" in printed
    assert job.processes() == []
    assert_same_run(tmp_path / "run", two)


def lose_a_rank(job: Job, metrics: Path, start: int) -> None:
    """SIGKILL to a rank of the given start from step 0, after its first step."""
    job.wait_until(lambda: job.printed.count("steps 1 to") == start)
    begun = time.time()
    rank = job.find(is_rank)
    # Until it is written anew, the file has the rows of the start before.
    job.wait_until(lambda: metrics.exists() and metrics.stat().st_mtime > begun and '"loss"' in metrics.read_text())
    rank.kill()


@pytest.mark.slow
def test_ranks_lost_again_and_again_are_not_a_refusal(
    launch: Launcher, config: Path, tmp_path: Path, two: Path
) -> None:
    """The others end with an `error: ` line, too."""
    job = launch("torchrun.sh", config, f"train.steps={STEPS}")
    for start in range(1, 4):
        lose_a_rank(job, tmp_path / "run" / "metrics.jsonl", start)
    printed = job.finish()
    assert len(re.findall("^error: ", printed, re.MULTILINE)) == 3, printed
    assert printed.count("starting again from step 0") == 3
    assert_same_run(tmp_path / "run", two)


@pytest.mark.parametrize(
    ("script", "number"),
    [
        ("torchrun.sh", signal.SIGTERM),
        pytest.param("deepspeed.sh", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("torchrun.sh", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("deepspeed.sh", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_ends_everything(
    launch: Launcher, script: str, number: int, config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    job = launch(script, config, f"train.steps={10**6}", "optim.schedule=constant")
    job.wait_until(lambda: (output / "metrics.jsonl").exists() and len(rows(output)) > 5)
    job.script.send_signal(number)
    assert job.status() == 75, job.printed
    assert job.processes() == []
    assert "start 1 of" not in job.printed
    (saved,) = (output / "checkpoints").iterdir()
    assert saved.name == f"step-{len(rows(output))}" and f"saved at step {len(rows(output))} of 1000000" in job.printed


@pytest.mark.slow
def test_run_whose_time_is_over_saves_and_is_not_started_again(launch: Launcher, config: Path, tmp_path: Path) -> None:
    job = launch("torchrun.sh", config, f"train.steps={10**6}", "train.time_limit=0.1")
    assert job.status() == 75, job.printed
    assert "stopped: train.time_limit is over; saved at step " in job.printed and "start 1 of" not in job.printed
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_signal_before_the_training_ends_everything(launch: Launcher, config: Path, tmp_path: Path) -> None:
    job = launch("torchrun.sh", config)
    job.find(is_first_rank)
    job.script.send_signal(signal.SIGTERM)
    assert job.status() == 143, job.printed
    assert job.processes() == [] and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_slurm_job_whose_time_is_up_is_queued_again_and_goes_on(
    launch: Launcher, config: Path, tmp_path: Path, two: Path
) -> None:
    job = launch("slurm.sbatch", config, f"train.steps={STEPS}", *EVERY)
    job.wait_for(tmp_path / "run" / "checkpoints" / "step-20")
    job.script.send_signal(signal.SIGUSR1)
    job.finish()
    assert job.processes() == []
    assert (tmp_path / "slurm" / "log").read_text() == f"requeue {os.getpid()}\n"
    assert "resuming from" in launch("slurm.sbatch", config, f"train.steps={STEPS}", *EVERY).finish()
    assert_same_run(tmp_path / "run", two)


@dataclass
class Hosts:
    """Two hosts: network namespaces of this machine that a cable joins, with one file system."""

    names: list[str]
    launch: Launcher

    def start(self, number: int, *arguments: object) -> Job:
        return self.launch(
            "torchrun.sh",
            *arguments,
            prefix=("ip", "netns", "exec", self.names[number]),
            NNODES=2,
            NODE_RANK=number,
            NPROC_PER_NODE=1,
            MASTER_ADDR=self.address(0),
            LOCAL_ADDR=self.address(number),
            GLOO_SOCKET_IFNAME="eth0",
        )

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def kill(self, number: int) -> None:
        """SIGKILL to everything that runs on a host."""
        while pids := ip("netns", "pids", self.names[number]).split():
            for pid in pids:
                os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts(launch: Launcher) -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts on one machine need root and iproute2")
    hosts = Hosts([f"launch-{os.getpid()}-{letter}" for letter in "ab"], launch)
    made = []
    try:
        for name in hosts.names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
            made.append(name)
        first, second = hosts.names
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for number, name in enumerate(hosts.names):
            ip("-n", name, "addr", "add", f"{hosts.address(number)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield hosts
    finally:
        launch.close()
        for name in made:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_hosts_train_like_one(hosts: Hosts, config: Path, tmp_path: Path, one: Path, two: Path) -> None:
    jobs = [hosts.start(number, config, f"train.steps={STEPS}") for number in range(2)]
    for job in jobs:
        assert "start 1 of" not in job.finish()
    assert losses(tmp_path / "run") == pytest.approx(losses(one), rel=1e-5)
    assert_same_run(tmp_path / "run", two)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["rendezvous", "other"])
def test_lost_host_comes_back(hosts: Hosts, victim: int, config: Path, tmp_path: Path, two: Path) -> None:
    arguments = (config, f"train.steps={STEPS}", *EVERY)
    jobs = [hosts.start(number, *arguments) for number in range(2)]
    jobs[victim].wait_for(tmp_path / "run" / "checkpoints" / "step-20")
    hosts.kill(victim)
    assert jobs[victim].status() == -signal.SIGKILL
    time.sleep(5)
    jobs[victim] = hosts.start(victim, *arguments)
    printed = [job.finish() for job in jobs]
    assert "start 1 of 10" in printed[1 - victim]  # the host that was not touched
    assert any("resuming from" in text for text in printed)
    assert_same_run(tmp_path / "run", two)

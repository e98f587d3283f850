"""Whole runs of the command, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from megakrause.checkpoint.read import find_checkpoint

KINDS = ("master", "exp_avg", "exp_avg_sq")


def start(*arguments: object) -> subprocess.Popen[str]:
    """`megakrause train ...` in a process of its own."""
    command = [sys.executable, "-m", "megakrause", "train", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_script(config: Path, *overrides: object, ranks: int = 1, prelude: str = "") -> subprocess.Popen[str]:
    """`megakrause train` on one or several ranks, each of which runs a piece of Python before; both outputs in one."""
    script = config.parent / "script.py"
    # Processes that it starts import it, too.
    run = "if __name__ == '__main__':\n    runpy.run_module('megakrause', run_name='__main__')\n"
    script.write_text(f"import os, runpy, time\n{prelude}\n{run}")
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    return subprocess.Popen(
        [*command, str(script), "train", str(config), "log.tensorboard=false", *map(str, overrides)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(*arguments: object) -> str:
    """Runs to the end and returns what was printed."""
    process = start(*arguments)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    """Waits until a running process has made a path."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)


def kill_when(process: subprocess.Popen[str], path: Path) -> None:
    """kill -9 as soon as a path exists."""
    wait_for(process, path)
    process.send_signal(signal.SIGKILL)
    process.wait()


def rows(output: Path) -> list[dict[str, float]]:
    """The steps of metrics.jsonl."""
    lines = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if "loss" in row]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in rows(output)]


def state(output: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Weights and optimizer state of a run's newest checkpoint, whole, by (name, kind)."""
    checkpoint = find_checkpoint(output)
    result = {}
    for name, shape in checkpoint.shapes.items():
        for kind in checkpoint.kinds(name):
            result[name, kind] = checkpoint.read(name, kind, 0, torch.Size(shape).numel())
    return result

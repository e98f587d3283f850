"""What a run says of itself: one JSON object a step, TensorBoard beside it. What cannot be written is said once, and
missing: training and its checkpoints go on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm

# Dense bf16 FLOP/s of a device, from the makers' data sheets, by a part of the name that CUDA gives.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


class MetricsLog:
    """OUTPUT/metrics.jsonl and OUTPUT/tensorboard. Only the main rank makes one."""

    def __init__(self, output: Path, start_step: int, tensorboard: bool):
        """Cuts what is there back to `start_step`: a resumed run repeats what came after its checkpoint."""
        self._path = output / "metrics.jsonl"
        if self._path.exists():
            _cut(self._path, start_step)
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115  one line, one write
        self._board: Any = None
        self._failed: set[str] = set()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=start_step + 1)

    def row(self, values: dict[str, Any]) -> None:
        """Adds one object to metrics.jsonl."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}  # JSON
        with self._explained(self._path):
            self._file.write(json.dumps(values) + "\n")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds points to TensorBoard."""
        if self._board is not None:
            with self._explained(self._board.log_dir):
                for name, value in values.items():
                    if math.isfinite(value):  # one that is not would hide the rest of its curve
                        self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a picture, uint8 [h, w, c], to TensorBoard."""
        if self._board is not None:
            with self._explained(self._board.log_dir):
                self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Ends both. What they could not write has been said before."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()

    @contextlib.contextmanager
    def _explained(self, path: Path | str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if str(path) not in self._failed:
                self._failed.add(str(path))
                tqdm.write(f"cannot write {path}: {error.strerror}; training goes on without", file=sys.stderr)


def _cut(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a line that a kill cut short
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def memory_gib(device: torch.device) -> float:
    """The largest memory that torch held on the device, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30

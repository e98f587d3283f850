"""Honest timing: contestants take turns, so that a machine that drifts drifts for all; medians are reported."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

QUEUED_SECONDS = 0.01  # that a GPU is kept busy for one measurement, so that starting the first call hides


def take_turns(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, replayed: bool = False
) -> dict[str, list[float]]:
    """Seconds of one call of each contestant in each round, after one round that does not count. A GPU is given as many
    calls at a time as keep it busy for a while. replayed: it works from recordings (CUDA graphs), so that it never
    waits for Python; a contestant must do the same in every call."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    calls = dict.fromkeys(contestants, 1)
    if torch.cuda.is_available() and replayed:
        contestants = {name: _recording(run) for name, run in contestants.items()}
    for name, run in contestants.items():
        run()
        if torch.cuda.is_available():
            calls[name] = max(1, min(200, int(QUEUED_SECONDS / _time(run, 1))))
    for _ in range(rounds):
        for name, run in contestants.items():
            seconds[name].append(_time(run, calls[name]))
    return seconds


def _recording(run: Callable[[], Any]) -> Callable[[], Any]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # what is compiled or allocated at the first call is no part of the recording
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _time(run: Callable[[], Any], calls: int) -> float:
    _synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize()
    return (time.perf_counter() - began) / calls


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow / fast: how many times faster the second is."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_memory(run: Callable[[], Any]) -> int | None:
    """Bytes by which memory in use grows, at most, during a run; None where the system does not tell."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed but kept would hide what the run needs
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark back to what is in use now
        before = _status_bytes("VmRSS")
        run()
        return _status_bytes("VmHWM") - before
    except (OSError, StopIteration):
        return None


def copy_bandwidth() -> float:
    """Bytes a second that a large copy on the GPU reads and writes, both counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: [target.copy_(source) for _ in range(8)]}, rounds=5)["copy"]
    return 8 * 2 * len(source) / min(seconds)


def machine() -> str:
    """The device, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

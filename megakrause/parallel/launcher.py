"""Processes that torchrun or deepspeed started: what becomes of them when their launcher dies before they have met."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # sys/prctl.h: the signal that this process gets when the one that started it ends


def is_launched() -> bool:
    return "MASTER_ADDR" in os.environ


def end_with_launcher() -> None:
    """From now on this process is killed when its launcher ends: alone, it would look for the others for many minutes.
    On Linux alone. To be called early, since a launcher that is gone by then cannot be told from any other parent."""
    _on_end_of_parent(signal.SIGKILL)


def outlive_launcher() -> None:
    """From now on the end of the launcher is nothing special: a run that trains notices it by other means."""
    _on_end_of_parent(0)


def _on_end_of_parent(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)

"""Requests to end early: signals, and the time that a job has."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TOGETHER = 3.0  # seconds in which a launcher and a terminal may both hand on what was one request


class StopRequest:
    """While it is open, a signal asks the run to save and end, and a second one ends this process at once."""

    def __init__(self, time_limit: float | None):
        """time_limit: minutes from now on after which to ask."""
        self._deadline = None if time_limit is None else time.monotonic() + 60 * time_limit
        self._first: tuple[signal.Signals, float] | None = None
        self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}

    @property
    def reason(self) -> str | None:
        """Why this process is asked to end, in words; None: it is not."""
        if self._first is not None:
            return f"{self._first[0].name} received"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "train.time_limit is over"
        return None

    def close(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = signal.Signals(number), now
        elif now - self._first[1] > TOGETHER:
            os.write(sys.stderr.fileno(), b"\nended at once, without saving; the earlier checkpoints are whole\n")
            os._exit(128 + number)

"""Decides what follows when training goes wrong. One rank decides for all, from numbers that all have."""

from __future__ import annotations

import math
import statistics
from collections import deque
from enum import IntEnum
from typing import Any

from megakrause.config import GuardConfig


class Verdict(IntEnum):
    GO_ON = 0
    ROLL_BACK = 1  # to the last checkpoint, and do the same again
    ROLL_BACK_AND_SKIP = 2  # to the last checkpoint, and leave out the data since then
    STOP = 3


class Guard:
    """Sees every step's loss. What is not finite never enters its statistics."""

    def __init__(self, config: GuardConfig):
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self.skipped = 0  # steps in a row
        self.reason = ""  # of the last verdict, in words
        self._again = (-1, 0)  # the checkpoint that was last gone back to, and how often

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep, as plain values."""
        losses = {"losses": list(self._losses)} if self._config.spike else {}
        return losses | ({"skipped": self.skipped} if self.skipped else {})

    def judge(self, loss: float, applied: bool) -> Verdict:
        """What follows a step. loss: nats per token. applied: whether it has changed the weights."""
        if not (applied and math.isfinite(loss)):
            self.skipped += 1
            self.reason = f"{self.skipped} steps in a row had a loss or gradient that is not finite"
            return Verdict.ROLL_BACK if self.skipped >= self._config.skips else Verdict.GO_ON
        self.skipped = 0
        if self._config.spike and len(self._losses) >= self._config.window // 2:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + self._config.spike * deviation:
                self.reason = f"a loss of {loss:.4g} after {mean:.4g} +- {deviation:.2g} is a spike"
                return Verdict.ROLL_BACK_AND_SKIP
        self._losses.append(loss)
        return Verdict.GO_ON

    def allowed(self, verdict: Verdict, step: int | None) -> Verdict:
        """The verdict, or STOP when there is no checkpoint (step None), or going back to it has not helped."""
        if verdict is Verdict.GO_ON:
            return verdict
        before = self._again[1] if self._again[0] == step else 0
        if step is None or before >= (1 if verdict is Verdict.ROLL_BACK else self._config.rollbacks):
            return Verdict.STOP
        self._again = step, before + 1
        return verdict

    def go_back(self, state: dict[str, Any]) -> None:
        """The run is where a checkpoint kept this state."""
        self._losses = deque(state.get("losses", []), maxlen=self._config.window)
        self.skipped = state.get("skipped", 0)

"""Mixing: which source gives each sample of a run, by weights that may change on the way.

At every moment each source has given within one sample of its share since the weights last changed (of weights that
are fractions of at most FINEST, else rounded to that). A source that has
been used as often as it may be drops out, and the others share what was its. All of it follows from the sources and
their weights, not from how long a run is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

FINEST = 200_000  # weights that are not fractions of a smaller common denominator are rounded to one of this


@dataclass(frozen=True)
class Share:
    """What a source gives."""

    weights: tuple[tuple[int, float], ...]  # (from this sample of the run on, weight), ascending from 0
    limit: int | None = None  # samples that it has to give; None: endless

    def weight(self, sample: int) -> float:
        """Its weight at a sample of the run."""
        return [weight for start, weight in self.weights if start <= sample][-1]


@dataclass(frozen=True)
class Segment:
    """A part of a run in which weights stay the same."""

    start: int  # its first sample
    units: tuple[int, ...]  # weight of each source, in whole numbers
    given: tuple[int, ...]  # samples that each source has given before

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, sample of the source) of samples [n] of the run."""
        turns, ranks = self._round
        round, place = np.divmod(samples - self.start, len(turns))
        source = turns[place].astype(np.int64)
        return source, np.array(self.given)[source] + round * np.array(self.units)[source] + ranks[place]

    def given_at(self, sample: int) -> list[int]:
        """Samples that each source has given before a sample of the run."""
        turns, _ = self._round
        round, place = divmod(sample - self.start, len(turns))
        inside = np.bincount(turns[:place], minlength=len(self.units))
        return [g + round * u + int(n) for g, u, n in zip(self.given, self.units, inside, strict=True)]

    @cached_property
    def _round(self) -> tuple[np.ndarray, np.ndarray]:
        return schedule(self.units)

    def after(self, source: int, count: int) -> int:
        """The sample of the run that comes after a source has given `count` more, count >= 1."""
        turns, _ = self._round
        round, place = divmod(count - 1, self.units[source])
        return self.start + round * len(turns) + int(np.flatnonzero(turns == source)[place]) + 1


class Mixture:
    """The sources of every sample of an endless run. `size` is how many samples there are; None: endless."""

    def __init__(self, shares: Sequence[Share]) -> None:
        """Raises ValueError when no source has a weight from the first sample on."""
        self.segments: list[Segment] = []
        self.size: int | None = None
        changes = sorted({start for share in shares for start, _ in share.weights})
        start, given = 0, [0] * len(shares)
        while self.size is None:
            left = [None if s.limit is None else s.limit - g for s, g in zip(shares, given, strict=True)]
            weights = [0.0 if n == 0 else s.weight(start) for s, n in zip(shares, left, strict=True)]
            if not any(weights):
                if start == 0:
                    raise ValueError("no source has a weight at the start")
                self.size = start
                break
            segment = Segment(start, whole_weights(weights), tuple(given))
            self.segments.append(segment)
            ends = [change for change in changes if change > start][:1]
            ends += [segment.after(i, n) for i, n in enumerate(left) if n is not None and segment.units[i]]
            if not ends:
                break
            start = min(ends)
            given = segment.given_at(start)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, sample of that source counted over its epochs) of samples [n] of the run; int64 [n] each. Raises
        ValueError for samples after the last."""
        if self.size is not None and len(samples) and samples.max() >= self.size:
            raise ValueError(f"sample {samples.max()} of a mixture of {self.size}")
        starts = np.array([segment.start for segment in self.segments])
        numbers = np.searchsorted(starts, samples, "right") - 1
        source, sample = np.empty_like(numbers), np.empty_like(numbers)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            source[chosen], sample[chosen] = self.segments[number].locate(samples[chosen])
        return source, sample

    def given_before(self, sample: int) -> list[int]:
        """Samples that each source has given before a sample of the run."""
        return self.past(sample)[-1].given_at(sample)

    def past(self, sample: int) -> list[Segment]:
        """The segments that a run up to a sample has met."""
        return [segment for segment in self.segments if segment.start < max(sample, 1)]


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights in whole numbers of one unit; exact as decimals when FINEST units are enough for that."""
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    units = [int(weight * denominator) for weight in exact]
    units = [unit // math.gcd(*units) for unit in units]
    if sum(units) <= FINEST:
        return tuple(units)
    total = sum(exact)
    ideal = [weight / total * FINEST for weight in exact]
    units = [max(1, int(part)) if part else 0 for part in ideal]
    for index in sorted(range(len(units)), key=lambda i: units[i] - ideal[i])[: max(0, FINEST - sum(units))]:
        units[index] += 1
    return tuple(units)


def schedule(units: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Whose turn it is at each of sum(units) samples, after which it begins again, and how many turns that source had
    before. After any number n of samples, source i has had within 1 - 1 / (2k - 2) of n * units[i] / sum(units).

    Tijdeman, "The chairman assignment problem" (1980): of k sources, those whose share is at least 1 / (2k - 2) ahead
    of their turns may have the next one, and the one that has to have it first gets it."""
    total, present = sum(units), [i for i, unit in enumerate(units) if unit]
    turns = np.empty(total, np.min_scalar_type(len(units)))
    if len(present) == 1:
        turns[:] = present[0]
        return turns, np.arange(total, dtype=np.int32)
    parts = 2 * len(present) - 2
    waiting: list[tuple[int, int, int]] = []  # (when it may have its next turn, when it must, source)
    ready: list[tuple[int, int]] = []

    def wait(source: int, had: int) -> None:
        scale = parts * units[source]
        first = -(-total * (1 + parts * had) // scale)
        heapq.heappush(waiting, (first, total * (parts - 1 + parts * had) // scale, source))

    had = [0] * len(units)
    for source in present:
        wait(source, 0)
    for n in range(1, total + 1):
        while waiting and waiting[0][0] <= n:
            _, last, source = heapq.heappop(waiting)
            heapq.heappush(ready, (last, source))
        _, source = heapq.heappop(ready)
        turns[n - 1] = source
        had[source] += 1
        wait(source, had[source])
    ranks = np.empty(total, np.int32)
    for source in present:
        ranks[turns == source] = np.arange(units[source])
    return turns, ranks

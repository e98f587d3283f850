"""Several sources mixed: what stands in each sample of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megakrause.batch import TokenBatch
from megakrause.data.mixture import Mixture
from megakrause.data.remote import BlockCache
from megakrause.data.stream import TextStream
from megakrause.data.tokens import TokenWindows
from megakrause.data.windows import Rows


class MixedWindows:
    """Windows of several sources, by weights (mixture.py)."""

    def __init__(
        self,
        sources: Sequence[TokenWindows | TextStream],
        mixture: Mixture,
        mask_documents: bool,
        cache: BlockCache | None = None,
    ) -> None:
        """cache: of sources that are read from elsewhere, which `close` closes."""
        self._cache = cache
        self.sources = sources
        self.mixture = mixture
        self.mask_documents = mask_documents

    def batch(self, samples: np.ndarray) -> TokenBatch:
        """Samples [b] of the run. Raises UserError for damaged data."""
        sources, inside = self.mixture.locate(np.asarray(samples))
        rows = Rows(len(sources), self.sources[0].seq_len, self.sources[0].eos)
        for number in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == number)
            self.sources[number].fill(rows, chosen, inside[chosen])
        return replace(rows.batch(self.mask_documents), numbers=torch.from_numpy(np.asarray(samples, np.int64)))

    def describe(self, start: int, count: int) -> list[str]:
        """A line for each source: what it is, and its part in `count` samples from `start` on; then what people should
        know of them."""
        before, after = self.mixture.given_before(start), self.mixture.given_before(start + count)
        lines = [
            f"data: {(b - a) / max(count, 1):6.1%} from {source.describe(a, b)}"
            for source, a, b in zip(self.sources, before, after, strict=True)
        ]
        corpora = [source for source in self.sources if isinstance(source, TokenWindows)]
        return lines + [f"data: {note}" for source in corpora for note in source.corpus.notes(source.eos)]

    @property
    def names(self) -> dict[str, str]:
        """What people call each source, by fingerprint."""
        return {source.fingerprint: source.name for source in self.sources}

    def past(self, sample: int) -> list[dict[str, Any]]:
        """What decided the samples before one of the run, as plain values: equal pasts, equal samples."""
        names = [source.fingerprint for source in self.sources]
        return [
            {"start": segment.start, "mix": {n: u for n, u in zip(names, segment.units, strict=True) if u}}
            for segment in self.mixture.past(sample)
        ]

    def stream_states(self, sample: int) -> dict[str, Any]:
        """Where streamed sources have to begin again so that the run goes on from a sample, by fingerprint."""
        given = self.mixture.given_before(sample)
        return {
            source.fingerprint: source.state(count)
            for source, count in zip(self.sources, given, strict=True)
            if isinstance(source, TextStream)
        }

    def resume(self, states: dict[str, Any]) -> None:
        """Before anything is read: goes on from what `stream_states` gave."""
        for source in self.sources:
            if isinstance(source, TextStream) and source.fingerprint in states:
                source.resume(states[source.fingerprint])

    def close(self) -> None:
        """Ends what waits for a store, and the processes of streamed sources. Nothing can be read afterwards."""
        if self._cache is not None:
            self._cache.close()
        for source in self.sources:
            if isinstance(source, TextStream):
                with suppress(ValueError):  # a thread that was left behind is reading
                    source.close()


def describe_past(past: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """What `MixedWindows.past` gave, in words. Of sources of one name, `names` tells the contents apart."""
    counts = Counter(names.values())
    names = {content: n if counts[n] == 1 else f"{n} (content {content[:6]}..)" for content, n in names.items()}
    parts = []
    for segment in past:
        total = sum(segment["mix"].values())
        mix = " + ".join(f"{units / total:.3g} {names.get(name, name)}" for name, units in segment["mix"].items())
        parts.append(f"{mix} from sequence {segment['start']} on")
    return ", ".join(parts)

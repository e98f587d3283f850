"""Text that is tokenized while it is read: files, or Hugging Face datasets, without a corpus.

A stream is read from its beginning, in blocks of about BLOCK_BYTES of text; the documents of a block are permuted and
packed, and its windows permuted, as those of a corpus's block are. Which sample a block begins with is known only when
all before it have been tokenized, so that a run goes on from a state: the block that its next sample is in, the sample
with which that begins, and where in the inputs. All ranks read all of it and take their own rows: at 1.5 million tokens
a second and core that is for runs of a few million tokens a second; larger ones are served better by a corpus.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import xxhash
from tqdm import tqdm

from megakrause.data.encode import EncodeOptions, encode_groups
from megakrause.data.inputs import Input, find_inputs
from megakrause.data.order import key_of, permute
from megakrause.data.packing import Packing
from megakrause.data.quarantine import Rejected
from megakrause.data.sources import Part, cut_parts, group_parts
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.windows import PackedBlock, Rows
from megakrause.errors import UserError

BLOCK_BYTES = 16 << 20  # of text
ENOUGH, BAD = 1000, 0.01  # of so many documents, and of a whole epoch, so large a part may be bad
PARTS, PART = 4, 4096  # of a file that its fingerprint is taken of, at even distances, and bytes of each


class Place(NamedTuple):
    """Where a block begins."""

    sample: int = 0
    epoch: int = 0
    number: int = 0  # in its epoch
    input: int = 0
    start: int = 0  # in the input, see `sources.Part`


class _Block(NamedTuple):
    place: Place
    end: int  # the sample after it
    tokens: np.ndarray
    packed: PackedBlock
    key: np.uint64


class TextStream:
    """Documents of inputs as windows of `seq_len` targets, in their order but for permutations within blocks."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[Input],
        tokenizer: Tokenizer,
        options: EncodeOptions,
        *,
        seq_len: int,
        seed: int,
        packing: Packing = "concat",
        workers: int = 0,
    ) -> None:
        """workers: processes that tokenize; 0: whoever reads does."""
        self.name = name
        self.seq_len = seq_len
        self.eos = tokenizer.eos
        what = ([_content(one) for one in inputs], tokenizer.fingerprint, options, BLOCK_BYTES)
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr(what).encode())
        self._inputs, self._tokenizer, self._options = inputs, tokenizer, options
        self._known = set(inputs)
        self._seed, self._packing, self._workers = seed, packing, workers
        self._places = [Place()]  # of the blocks that may be asked for, and the next to be read
        self._blocks: list[_Block] = []
        self._bad = self._good = 0
        self._reader = self._read()

    def fill(self, rows: Rows, numbers: np.ndarray, samples: np.ndarray) -> None:
        """Writes samples [n] into the rows of these numbers [n]. Raises ValueError for samples of blocks before those
        that were asked for last, UserError when there is no text, or too much of it is bad."""
        if not len(samples):
            return
        first, last = int(samples.min()), int(samples.max())
        self._blocks = [block for block in self._blocks if block.end > first]
        while not self._blocks or self._blocks[-1].end <= last:
            block = next(self._reader)
            if block.end > first:
                self._blocks.append(block)
        if self._blocks[0].place.sample > first:
            raise ValueError(f"sample {first} of {self.name} is behind, it goes on from {self._blocks[0].place.sample}")
        for block in self._blocks:
            chosen = np.flatnonzero((samples >= block.place.sample) & (samples < block.end))
            if len(chosen):
                windows = permute(samples[chosen] - block.place.sample, block.end - block.place.sample, block.key)
                block.packed.write(rows, numbers[chosen], windows, partial(np.take, block.tokens))

    def resume(self, state: Sequence[int]) -> None:
        """Before anything is read: goes on from what `state` gave in the run before."""
        self._places = [Place(*state)]

    def state(self, sample: int) -> list[int]:
        """What a run that goes on from this sample needs. It may not be before that of an earlier call."""
        while len(self._places) > 1 and self._places[1].sample <= sample:
            self._places.pop(0)
        return list(self._places[0])

    def describe(self, start: int, stop: int) -> str:
        """What samples [start, stop) of it are."""
        size = sum(one.size for one in self._inputs) / 2**20
        return f"{self.name}, streamed: {len(self._inputs)} inputs, {size:,.1f} MiB, sequences {start} to {stop}"

    def close(self) -> None:
        """Ends its processes. Nothing can be read afterwards."""
        self._reader.close()

    def _read(self) -> Generator[_Block, None, None]:
        """Every block from the first place on, endlessly."""
        place = self._places[0]
        while True:
            parts = cut_parts(self._inputs, self._options.reading, place.input, place.start)
            groups = encode_groups(group_parts(parts), self._tokenizer, self._options, self._workers)
            tokens, lengths, size, begun = [], [], 0, place.sample
            self._good = self._bad = 0
            try:
                for group, made in groups:
                    self._check(group)
                    self._count(len(made.lengths), made.rejected, ENOUGH)
                    tokens.append(made.tokens)
                    lengths.append(made.lengths)
                    size += made.text_bytes
                    if size >= BLOCK_BYTES:
                        following = place._replace(
                            number=place.number + 1, input=group[-1].number, start=group[-1].stop
                        )
                        block = self._block(place, tokens, lengths)
                        yield self._next(block, following)
                        place = following._replace(sample=block.end)
                        tokens, lengths, size = [], [], 0
            finally:
                groups.close()
            self._count(0, [], 1)
            following = Place(0, place.epoch + 1)
            if size:
                block = self._block(place, tokens, lengths)
                yield self._next(block, following)
                place = place._replace(sample=block.end)
            if place.sample == begun and not (place.input or place.start):
                raise UserError(f"{self.name} has no text: no document of it can be read")
            place = following._replace(sample=place.sample)

    def _block(self, place: Place, tokens: list[np.ndarray], lengths: list[np.ndarray]) -> _Block:
        key = (self._seed, int(self.fingerprint[:16], 16), place.epoch)
        bounds = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])
        packed = PackedBlock.of(bounds, self.seq_len, self._packing, key_of(*key, 2, place.number))
        joined = np.concatenate(tokens).astype(np.int64)
        return _Block(place, place.sample + len(packed.first) - 1, joined, packed, key_of(*key, 1, place.number))

    def _next(self, block: _Block, following: Place) -> _Block:
        self._places.append(following._replace(sample=block.end))
        return block

    def _check(self, group: list[Part]) -> None:
        """Raises UserError when a file is not what it was at the start: its documents would be lost, unnoticed."""
        for path in {part.input.path for part in group if part.input.kind != "dataset"}:
            try:
                (now,) = find_inputs([path])
            except UserError as error:
                raise UserError(f"{path} is gone while it is in use; start again when it is back") from error
            if now not in self._known:
                raise UserError(f"{path} was changed while it is in use; start again with the files as they are")

    def _count(self, good: int, rejected: Iterable[list[Rejected]], enough: int) -> None:
        """Raises UserError when too many of at least `enough` documents are bad, or a file is damaged."""
        self._good += good
        for bad in rejected:
            for one in bad:
                if one.damaged:
                    raise UserError(f"{one.source} is damaged: {one.reason}")
                if not self._bad and os.environ.get("RANK", "0") == "0":
                    line = "" if one.line is None else f", line {one.line} of a part"
                    said = f"{self.name}: what cannot be read is left out, first {one.source}{line}: {one.reason}"
                    tqdm.write(said, file=sys.stderr)
                self._bad += 1
        total = self._good + self._bad
        if total >= enough and self._bad > BAD * total:
            raise UserError(
                f"{self._bad} of {total} documents of {self.name} cannot be read; prepare a corpus of it, which lists "
                "them"
            )


def _content(one: Input) -> tuple[str, int, str]:
    """What stands for an input, wherever it lies."""
    if one.kind == "dataset":
        return one.path, one.size, one.stamp
    digest = xxhash.xxh3_128()
    try:
        with open(one.path, "rb") as file:
            for part in range(PARTS):
                file.seek(part * max(one.size - PART, 0) // (PARTS - 1))
                digest.update(file.read(PART))
    except OSError as error:
        raise UserError(f"cannot read {one.path}: {error.strerror}") from error
    return os.path.basename(one.path), one.size, digest.hexdigest()

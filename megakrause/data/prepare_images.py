"""From images to a corpus of them: every file is decoded once, to see that it can be, and kept as it was.

What cannot be decoded goes to PREFIX.quarantine.jsonl with its place and the reason; a class that is none stops the
run. Stopped at any moment, the same call goes on where the writer's journal says."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image
from tqdm import tqdm

from megakrause.data.augment import FORMATS, NoImage, opened
from megakrause.data.image_sources import Found, ImageSource
from megakrause.data.images import HASHED, LABEL
from megakrause.data.layout import ImagesInfo, check_output, manifest_path
from megakrause.data.quarantine import Quarantine, Rejected
from megakrause.data.workers import in_order
from megakrause.data.writer import SHARD_BYTES, CorpusWriter
from megakrause.errors import UserError

GROUP = 64  # images that a worker looks at together
SAVE_SECONDS = 3.0  # of work that a kill can cost
ENOUGH = 1000  # images, of which a share means something


@dataclass(frozen=True)
class ImageSummary:
    images: int
    classes: list[str]
    kinds: dict[str, int]  # images by Pillow's mode: RGB, L (gray), CMYK, I;16 and so on
    smallest: tuple[int, int]  # width and height
    rejected: int
    quarantine: Path | None
    passed_over: int  # files that do not end as an image's do


def prepare_images(
    inputs: list[str],
    prefix: str | Path,
    *,
    image_field: str = "image",
    label_field: str = "label",
    classes: list[str] | None = None,
    workers: int = 1,
    max_rejected: int | float = 0.01,
    overwrite: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> ImageSummary:
    """Writes the corpus `prefix` (layout.py) from `inputs` (image_sources.py), one after the other.

    classes: their names; default: what the inputs say, or the numbers up to the largest label. More than
    `max_rejected` bad images, a number (int) or a share (float), stop the run. The files are the same for any number
    of workers and of interruptions. Raises UserError."""
    check_output(prefix)
    sources = [ImageSource(name, image_field, label_field) for name in inputs]
    named = [source.classes for source in sources if source.classes is not None]
    if classes is None and named:
        classes = named[0]
        if other := [source for source in sources if source.classes not in (None, classes)]:
            raise UserError(f"{other[0].name} has classes {other[0].classes}, inputs before it have {classes}")
    stamps = xxhash.xxh3_128_hexdigest(repr([source.stamp() for source in sources]).encode())
    settings = {"inputs": stamps, "classes": classes, "shard_bytes": shard_bytes, "fields": [image_field, label_field]}
    if not overwrite and manifest_path(prefix).exists():
        raise UserError(f"the corpus {prefix} is there and finished: choose another name, or --overwrite")
    with CorpusWriter(
        prefix, ImagesInfo(classes=classes or []), shard_bytes=shard_bytes, block_size=HASHED, settings=settings
    ) as writer:
        if writer.anew:
            tqdm.write(f"{prefix}: begins anew, for {writer.anew}", file=sys.stderr)
        run = _Run(writer, classes, max_rejected)
        images = _from(sources, run.done)
        totals = [source.total for source in sources]
        total = None if None in totals else sum(total or 0 for total in totals)
        with tqdm(total=total, initial=run.done, desc="preparing", unit="image", unit_scale=True) as bar:
            for group, examined in _examined(images, workers):
                run.add(group, examined)
                bar.update(len(group))
        return run.finish(sum(source.passed_over for source in sources))


def _from(sources: list[ImageSource], start: int) -> Iterator[Found]:
    """The images of all from the start-th on."""
    for source in sources:
        if source.total is None:  # which are read again, and not looked at
            for found in source.read():
                if start:
                    start -= 1
                else:
                    yield found
            continue
        if start < source.total:
            yield from source.read(start)
        start = max(0, start - source.total)


def _examined(images: Iterator[Found], workers: int) -> Iterator[tuple[list[Found], list[Any]]]:
    """Groups of images, in order, with what `_examine` finds."""
    groups = iter(lambda: list(islice(images, GROUP)), [])
    if workers <= 1:
        yield from ((group, _examine(group)) for group in groups)
    else:
        yield from in_order(groups, _examine, workers, __name__)


def _examine(group: list[Found]) -> list[tuple[str, tuple[int, int]] | str]:
    """(mode, size) of each file, or why it cannot be decoded."""
    results: list[tuple[str, tuple[int, int]] | str] = []
    for content in (found.content for found in group):
        try:
            with Image.open(BytesIO(content), formats=FORMATS) as header:
                mode = header.mode
            results.append((mode, opened(content).size))
        except NoImage as error:
            results.append(str(error))
        except Exception:  # of a header that is none
            results.append("no image of a known format")
    return results


class _Run:
    """How far the images have gone into the corpus."""

    def __init__(self, writer: CorpusWriter, classes: list[str] | None, max_rejected: int | float):
        self._writer, self._classes, self._max_rejected = writer, classes, max_rejected
        before = writer.progress or {}
        self.done: int = before.get("done", 0)  # images that were looked at
        self._rejected: int = before.get("rejected", 0)
        self._largest: int = before.get("largest", -1)
        self._kinds: Counter[str] = Counter(before.get("kinds", {}))
        self._smallest: tuple[int, int] = tuple(before.get("smallest", (sys.maxsize, sys.maxsize)))
        self._quarantine = Quarantine(writer.prefix, before.get("quarantine", 0))
        self._saved = time.monotonic()

    def add(self, group: list[Found], examined: list[Any]) -> None:
        records: list[bytes] = []
        for found, result in zip(group, examined, strict=True):
            self.done += 1
            if isinstance(result, str):
                self._quarantine.add([Rejected(found.place, None, result)])
                self._rejected += 1
                self._check_rejected(found, result)
                continue
            label = self._label(found)
            self._largest = max(self._largest, label)
            mode, size = result
            self._kinds[mode] += 1
            self._smallest = min(self._smallest[0], size[0]), min(self._smallest[1], size[1])
            records.append(np.array(label, LABEL).tobytes() + found.content)
        if records:
            content = np.frombuffer(b"".join(records), np.uint8)
            self._writer.add(content, np.array([len(record) for record in records]), 0)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._writer.save(self._progress())
            self._saved = time.monotonic()

    def finish(self, passed_over: int) -> ImageSummary:
        share = self._max_rejected
        if isinstance(share, float) and self._rejected > share * self.done:
            raise UserError(self._too_many())
        if self._classes is None:
            self._classes = [str(label) for label in range(self._largest + 1)]
            self._writer.content = ImagesInfo(classes=self._classes)
        there = self._quarantine.path if self._rejected else None
        self._writer.save(self._progress())
        return ImageSummary(
            self._writer.num_documents,
            self._classes,
            dict(self._kinds),
            self._smallest,
            self._rejected,
            there,
            passed_over,
        )

    def _progress(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "rejected": self._rejected,
            "largest": self._largest,
            "kinds": dict(self._kinds),
            "smallest": list(self._smallest),
            "quarantine": self._quarantine.sync(),
        }

    def _label(self, found: Found) -> int:
        """Raises UserError for one that is no class."""
        label, classes = found.label, self._classes
        if isinstance(label, str) and classes is not None and label in classes:
            return classes.index(label)
        limit = 2**31 if classes is None else len(classes)
        if not isinstance(label, int | np.integer) or isinstance(label, bool) or not 0 <= label < limit:
            known = "a number from 0 on" if classes is None else f"one of the {len(classes)} classes"
            raise UserError(f"{found.place}: label {label!r} is not {known}; mend it, or leave the image out")
        return int(label)

    def _check_rejected(self, found: Found, reason: str) -> None:
        """Raises UserError when there are too many."""
        limit = self._max_rejected
        if isinstance(limit, float):
            limit = limit * self.done if self.done >= ENOUGH else max(limit * ENOUGH, limit)
        if self._rejected > limit:
            raise UserError(f"{self._too_many()}; the last: {found.place} ({reason})")

    def _too_many(self) -> str:
        return (
            f"{self._rejected} of {self.done} images cannot be decoded, more than --max-rejected "
            f"allows, see {self._quarantine.path}"
        )

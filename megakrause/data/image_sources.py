"""Where images come from: folders of classes, tables and datasets of Hugging Face, and arrays as MNIST and CIFAR have
them. Nothing is decoded here but arrays, which become PNG files."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from PIL import Image
from pyarrow import parquet
from tqdm import tqdm

from megakrause.data.hf_dataset import cannot_read, describe_dataset, is_dataset, open_dataset
from megakrause.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
CIFAR_LABELS = {"cifar10": 1, "cifar100": 2}  # bytes before each image of their binary versions; the last is meant
ROWS = 256


@dataclass(frozen=True)
class Found:
    """An image file as it was found, with what is said of its class."""

    place: str  # for messages
    content: bytes
    label: Any


class ImageSource:
    """Images in order, and the names of their classes; None where they are numbers."""

    def __init__(self, name: str, image_field: str = "image", label_field: str = "label"):
        """Raises UserError when there is nothing of the kind."""
        self.name = name
        self.classes: list[str] | None = None
        self.total: int | None = None
        self.passed_over = 0  # files of class folders, and beside them, that do not end as an image's do
        self._fields = image_field, label_field
        path = Path(name)
        if is_dataset(name):
            self._rows = self._dataset
            features = open_dataset(name, describe_dataset(name)[1]).features or {}
            self._check(list(features))
            self.classes = getattr(features.get(label_field), "names", None)
        elif path.is_dir():
            self._files, self.passed_over = _class_folders(path)
            self.classes = [folder.name for folder, _ in self._files]
            self.total = sum(len(files) for _, files in self._files)
            self._rows = self._folders
        elif not path.is_file():
            raise UserError(f"{name} is neither a folder of class folders, a file of images, nor hf:DATASET")
        elif path.suffix == ".parquet":
            try:
                table = parquet.ParquetFile(path)
            except (OSError, arrow.ArrowException) as error:
                raise UserError(f"cannot read {path}: {error}") from error
            self._check(table.schema_arrow.names)
            self.classes = _class_names(table.schema_arrow.metadata or {}, label_field)
            self.total = table.metadata.num_rows
            self._rows = self._table
        else:
            pixels, labels = _arrays(path)
            self.total = len(pixels)
            self._rows = lambda start: _encoded(name, pixels, labels, start)

    def read(self, start: int = 0) -> Iterator[Found]:
        """The images from the start-th on. Raises UserError when they cannot be read."""
        yield from self._rows(start)

    def stamp(self) -> str:
        """Changes when the content does."""
        if is_dataset(self.name):
            return describe_dataset(self.name)[1]
        path = Path(self.name)
        paths = [file for _, files in self._files for file in files] if path.is_dir() else [path]
        return repr([(str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in paths])

    def _check(self, there: list[str]) -> None:
        if missing := [field for field in self._fields if field not in there]:
            raise UserError(f"{self.name} has no field '{missing[0]}' but {', '.join(map(repr, there))}")

    def _folders(self, start: int) -> Iterator[Found]:
        number = 0
        for label, (_, files) in enumerate(self._files):
            for file in files[max(0, start - number) :]:
                try:
                    yield Found(str(file), file.read_bytes(), label)
                except OSError as error:
                    raise UserError(f"cannot read {file}: {error.strerror}") from error
            number += len(files)

    def _table(self, start: int) -> Iterator[Found]:
        image, label = self._fields
        row = 0
        with parquet.ParquetFile(self.name) as table:
            for batch in table.iter_batches(ROWS, columns=[image, label]):
                if row + len(batch) > start:
                    for i, one in enumerate(batch.to_pylist()):
                        if row + i >= start:
                            yield Found(f"{self.name}, row {row + i}", _content(one[image]), one[label])
                row += len(batch)

    def _dataset(self, start: int) -> Iterator[Found]:
        import datasets

        image, label = self._fields
        rows = open_dataset(self.name, self.stamp()).cast_column(image, datasets.Image(decode=False))
        try:
            for i, row in enumerate(rows.skip(start), start):
                yield Found(f"{self.name}, row {i}", _content(row[image]), row[label])
        except UserError:
            raise
        except Exception as error:  # `datasets` and what it builds on raise dozens of types
            raise cannot_read(self.name, error) from error


def _content(value: Any) -> bytes:
    """Of an image column: bytes, or a struct with them; empty where there are none."""
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else b""


def _class_names(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    """As `datasets` writes them into parquet files."""
    found = re.search(rb'"%s": \{"names": (\[.*?\])' % re.escape(label.encode()), metadata.get(b"huggingface", b""))
    if found is None:
        return None
    return list(json.loads(found[1]))


def _class_folders(root: Path) -> tuple[list[tuple[Path, list[Path]]], int]:
    """(folder of a class, its images), by name, and how many other files there are. Raises UserError for an empty one,
    or if there is none."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{root} has no folders; it needs one for each class, with images in it")
    found, others = [], sum(path.is_file() for path in root.iterdir() if not path.name.startswith("."))
    for folder in folders:
        there = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
        files = sorted(file for file in there if file.suffix.lower() in SUFFIXES)
        others += len(there) - len(files)
        if not files:
            raise UserError(f"{folder} has no images; remove it, or put in what belongs to the class '{folder.name}'")
        found.append((folder, files))
    first = found[0][1][0].relative_to(root)
    if all(len({file.parent for file in files} - {folder}) > 1 for folder, files in found):
        tqdm.write(
            f"warning: each folder of {root} is a class, and each has folders of images; is one of them meant, such as "
            f"{root / first.parts[0]}?",
            file=sys.stderr,
        )
    return found, others


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, height, width] or [n, height, width, 3], labels [n]) of a file. Raises UserError."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                names = {name for name in file.files}
                if not {"images", "labels"} <= names:
                    raise UserError(f"{path} has arrays {sorted(names)}; it needs 'images' and 'labels'")
                pixels, labels = file["images"], file["labels"]
        elif "-idx3-ubyte" in path.name:
            pixels = _idx(path, 3)
            labels = _idx(path.with_name(path.name.replace("images-idx3", "labels-idx1")), 1)
        elif path.suffix == ".bin":
            pixels, labels = _cifar(path)
        else:
            raise UserError(
                f"{path} holds no images that are known here: .npz with 'images' and 'labels', MNIST's "
                "...-images-idx3-ubyte[.gz], CIFAR's binary version (.bin), or .parquet"
            )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.ndim == 4 and pixels.shape[3] not in (1, 3):
        raise UserError(f"{path}: images are {pixels.dtype} {list(pixels.shape)}; uint8 [n, h, w] or [n, h, w, 3] fits")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; integers [{len(pixels)}] fit")
    return pixels, labels


def _idx(path: Path, dims: int) -> np.ndarray:
    """MNIST's format."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 + 4 * dims or content[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{path.name} is no idx{dims}-ubyte file")
    shape = np.frombuffer(content, ">i4", dims, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = np.frombuffer(path.read_bytes(), np.uint8)
    for labels in sorted(CIFAR_LABELS.values(), reverse="cifar-100" in str(path)):
        if len(content) and len(content) % (labels + 3072) == 0:
            records = content.reshape(-1, labels + 3072)
            return records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, labels - 1].astype(int)
    raise ValueError(f"{len(content)} bytes are no records of CIFAR-10 (3073) or CIFAR-100 (3074)")


def _encoded(name: str, pixels: np.ndarray, labels: np.ndarray, start: int) -> Iterator[Found]:
    for i in range(start, len(pixels)):
        buffer = io.BytesIO()
        one = pixels[i]
        Image.fromarray(np.ascontiguousarray(one[..., 0] if one.shape[2:] == (1,) else one)).save(buffer, "PNG")
        yield Found(f"{name}, image {i}", buffer.getvalue(), int(labels[i]))

"""The files of a checkpoint: hashed from memory on their way out, compared with that hash before they are trusted, and
tensors in them that are read by ranges."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from megakrause.errors import Unreachable, UserError, explain_os_error

DTYPES = {
    **{torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.int64: "I64", torch.uint8: "U8"},
}
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
CHUNK = 2**23  # bytes that are hashed, written or read at a time
LARGEST = 64 << 20  # bytes of a file that is read whole
LONGEST_HEADER = 10**8  # bytes, as in the safetensors library


@dataclass(frozen=True)
class FileRecord:
    """What a commit says of one file."""

    name: str
    size: int  # bytes
    xxh3_128: str

    def to_json(self) -> dict[str, str | int]:
        return asdict(self)

    @staticmethod
    def from_json(tree: dict[str, Any]) -> FileRecord:
        """Raises ValueError or TypeError for what is no record, or of a file elsewhere."""
        record = FileRecord(**tree)
        as_size(record.size)
        if not FILE.fullmatch(record.name) or not isinstance(record.xxh3_128, str):
            raise ValueError(f"{record.name!r} is no file of a checkpoint")
        return record


class Folder(ABC):
    """Files to be read, wherever they lie. Everything raises OSError or UserError; what is not there,
    FileNotFoundError."""

    path: str

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def size(self, name: str) -> int: ...

    @abstractmethod
    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """Fills the buffer from a byte of a file on, and returns how many there were."""

    def read(self, name: str) -> bytes:
        """All of a small file."""
        if (size := self.size(name)) > LARGEST:
            raise UserError(f"{self.path}/{name} has {size} bytes; no such file has so many")
        buffer = bytearray(size)
        return bytes(buffer[: self.read_into(name, 0, memoryview(buffer))])


class Sink(Protocol):
    """Something that takes bytes."""

    def write(self, data: memoryview, /) -> int | None: ...


def write_chunks(sink: Sink, name: str, chunks: Iterator[bytes | memoryview]) -> FileRecord:
    """Writes to the end. The hash is of what was in memory, not of what was taken."""
    digest, size = xxhash.xxh3_128(), 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            digest.update(part)
            size += len(part)
            while part:  # an unbuffered write may take a part only; some stores do not say how much they took
                taken = sink.write(part)
                part = part[len(part) if taken is None else taken :]
    return FileRecord(name, size, digest.hexdigest())


def write_bytes(folder: Path, name: str, chunks: Iterator[bytes | memoryview]) -> FileRecord:
    """Writes and flushes one file on this machine's file systems. Raises OSError that names it."""
    path = folder / name
    try:
        with open(path, "wb", buffering=0) as file:
            record = write_chunks(file, name, chunks)
            os.fsync(file.fileno())
    except OSError as error:  # a failed write does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return record


def tensor_chunks(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], load: Callable[[str], torch.Tensor] | None = None
) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file, one tensor at a time, so that no second copy of all is ever held. load: gives
    the content of a tensor that is on the meta device, by its key."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key, tensor in tensors.items():
        if tensor.is_meta and load is not None:
            tensor = load(key)
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# What says that there is no such file, whoever asks and whenever; all else may be otherwise the next time.
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG}


def raise_if_unreachable(path: str, error: OSError) -> None:
    """Raises Unreachable for an error that does not say that the file is bad: a file server that is gone, rights that
    are missing, no more open files."""
    if error.errno not in (None, *ABSENT):
        raise Unreachable(f"cannot read {path}: {error.strerror}; it may be whole, so nothing older is used") from error


def as_size(value: Any) -> int:
    """A whole number of JSON, from 0 to 2^63 - 1. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no size")
    return value


class TensorFile:
    """A safetensors file of which ranges are read, and nothing is mapped that could vanish under the reader."""

    def __init__(self, folder: Folder, name: str):
        """Reads the header. Raises UserError or OSError."""
        self._folder, self._name = folder, name
        try:
            size = folder.size(name)
            length = int.from_bytes(self._read(0, 8), "little")
            if length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(self._read(8, length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
            free = 0  # the first byte that no tensor before has
            for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape = DTYPES_BY_NAME[entry["dtype"]], tuple(map(as_size, entry["shape"]))
                start, end = map(as_size, entry["data_offsets"])
                if end - start != math.prod(shape) * dtype.itemsize or not free <= start <= end <= size - 8 - length:
                    raise ValueError(f"{key} at bytes {start} to {end}")
                self._tensors[key] = dtype, shape, 8 + length + start
                free = end
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise UserError(f"{folder.path}/{name} is no readable safetensors file: {error}") from error

    def __iter__(self) -> Iterator[str]:
        """The names of its tensors."""
        return iter(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key][1]

    def tensor(self, key: str) -> torch.Tensor:
        """All of a tensor."""
        dtype, shape, _ = self._tensors[key]
        result = torch.empty(math.prod(shape), dtype=dtype)
        self.read_into(key, 0, result)
        return result.view(shape)

    def read_into(self, key: str, start: int, result: torch.Tensor) -> None:
        """Fills a contiguous 1-D tensor, of the same dtype or of a floating-point one that holds its values exactly,
        from element `start` of a flattened tensor on. Raises UserError when there are not so many."""
        dtype, shape, offset = self._tensors[key]
        widens = dtype.is_floating_point and torch.promote_types(dtype, result.dtype) == result.dtype
        if not (dtype == result.dtype or widens) or start + len(result) > math.prod(shape):
            raise UserError(
                f"{self._folder.path}/{self._name}: {key} is {tuple(shape)} of {dtype}; elements {start} to "
                f"{start + len(result)} of {result.dtype} are not in it"
            )
        if dtype != result.dtype:
            stored = torch.empty(len(result), dtype=dtype)
            self.read_into(key, start, stored)
            result.copy_(stored)
        elif len(result):
            content: Any = result.view(torch.uint8).numpy()
            self._fill(offset + start * dtype.itemsize, memoryview(content))

    def _read(self, offset: int, count: int) -> bytes:
        content = bytearray(count)
        self._fill(offset, memoryview(content))
        return bytes(content)

    def _fill(self, offset: int, buffer: memoryview) -> None:
        if (count := self._folder.read_into(self._name, offset, buffer)) != len(buffer):
            raise UserError(
                f"{self._folder.path}/{self._name} is truncated: {count} of {len(buffer)} bytes from byte {offset} on"
            )


def check_file(folder: Folder, record: FileRecord) -> str | None:
    """What is wrong with a file, in words; None if it is what the record says. Raises Unreachable."""
    path = f"{folder.path}/{record.name}"
    try:
        size = folder.size(record.name)
        if size != record.size:
            return f"{path} has {size} bytes instead of {record.size}"
        digest = xxhash.xxh3_128()
        for part in _read_ahead(folder, record.name, size):
            digest.update(part)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        raise_if_unreachable(path, error)
        return f"{path} cannot be read: {error.strerror or explain_os_error(error)}"
    return None if digest.hexdigest() == record.xxh3_128 else f"{path} does not match its checksum"


def _read_ahead(folder: Folder, name: str, size: int) -> Iterator[memoryview]:
    """A file from its beginning to its end, each part read while the one before is worked on."""
    buffers = [memoryview(bytearray(min(CHUNK, size))) for _ in range(2)]

    def read(offset: int, buffer: memoryview) -> memoryview:
        part = buffer[: size - offset]
        return part[: folder.read_into(name, offset, part)]

    with ThreadPoolExecutor(1) as reader:
        offset, ahead = 0, reader.submit(read, 0, buffers[0])
        while part := ahead.result():
            offset += len(part)
            buffers.reverse()
            ahead = reader.submit(read, offset, buffers[0])
            yield part


def make_folder(folder: Path) -> None:
    """Makes a folder and those that it lies in, so that they survive a loss of power."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def flush_folder(folder: Path) -> None:
    """Makes names just created or changed in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that are either whole and on disk or not there: written, hashed from memory and flushed before anyone relies on
them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}
READ_SIZE = 2**24  # bytes


@dataclass(frozen=True)
class FileRecord:
    """What a commit says of one file."""

    name: str
    size: int  # bytes
    xxh3_128: str

    def to_json(self) -> dict[str, str | int]:
        return asdict(self)


def write_bytes(folder: Path, name: str, chunks: Iterator[bytes | memoryview]) -> FileRecord:
    """Writes and flushes one file. The hash is of what was in memory, not of what the disk took. Raises OSError."""
    digest, size, path = xxhash.xxh3_128(), 0, folder / name
    try:
        with open(path, "wb", buffering=0) as file:
            for chunk in chunks:
                digest.update(chunk)
                view = memoryview(chunk).cast("B")
                size += len(view)
                while view:  # an unbuffered write may take a part only
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
    except OSError as error:  # a failed write does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return FileRecord(name, size, digest.hexdigest())


def write_tensors(
    folder: Path, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> FileRecord:
    """Writes a safetensors file one tensor at a time, so that no second copy of all is ever held. Raises OSError."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for tensor in tensors.values():
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                yield flat.numpy().data

    return write_bytes(folder, name, chunks())


def check_file(folder: Path, record: FileRecord) -> str | None:
    """What is wrong with a file, in words; None if it is what the record says."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{path} has {size} bytes instead of {record.size}"
        digest = xxhash.xxh3_128()
        buffer = memoryview(bytearray(READ_SIZE))
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if digest.hexdigest() == record.xxh3_128 else f"{path} does not match its checksum"


def flush_folder(folder: Path) -> None:
    """Makes names just created or changed in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

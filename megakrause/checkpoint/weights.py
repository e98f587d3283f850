"""Weights, and moments, that lie somewhere in files and are read by ranges."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch

from megakrause.checkpoint.files import Folder, TensorFile
from megakrause.checkpoint.fragment import Box
from megakrause.errors import UserError


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + numel) of a flattened box, and where they lie."""

    box: Box
    offset: int
    numel: int
    file: str
    key: str


@dataclass(frozen=True)
class _Rectangle:
    """Rows and columns of a parameter seen as a matrix, row by row from element `offset` of a flat tensor on."""

    rows: range
    columns: range
    offset: int

    def flat(self, rows: range) -> slice:
        """Where some of its rows lie in the flat tensor."""
        first = self.offset + (rows.start - self.rows.start) * len(self.columns)
        return slice(first, first + len(rows) * len(self.columns))


def _rectangles(box: Box, dim: int, offset: int, numel: int) -> list[_Rectangle]:
    """What elements [offset, offset + numel) of a flattened box are of the matrix that the parameter is when the dims
    before `dim` are its rows: the rest of a row, whole rows, the beginning of a row."""
    inner = math.prod(box.size[dim + 1 :])
    width, corner = math.prod(box.size[dim:]), (box.start[dim] * inner if box.start else 0)
    found, here, end = [], offset, offset + numel
    while here < end:
        row, column = divmod(here, width)
        whole_rows = 0 if column else (end - here) // width
        count = whole_rows * width or min(width - column, end - here)
        columns = range(corner, corner + width) if whole_rows else range(corner + column, corner + column + count)
        found.append(_Rectangle(range(row, row + max(1, whole_rows)), columns, here - offset))
        here += count
    return found


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def overlap(pieces: list[Piece]) -> bool:
    """Whether some element is in two of them."""
    boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Piece]] = {}
    for piece in pieces:
        boxes.setdefault((piece.box.start, piece.box.size), []).append(piece)
    for same in boxes.values():
        ordered = sorted(same, key=lambda piece: piece.offset)
        if any(b.offset < a.offset + a.numel for a, b in pairwise(ordered) if b.numel):
            return True
    return any(
        all(x < y + m and y < x + n for x, n, y, m in zip(*a, *b, strict=True)) for a, b in combinations(boxes, 2)
    )


class Weights(ABC):
    """Parameters by our names. Whoever needs a part of one reads that part and no more."""

    def __init__(self, folder: Folder):
        self.folder, self.path = folder, folder.path
        self._open: dict[str, TensorFile] = {}

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""

    @abstractmethod
    def pieces(self, name: str, kind: str) -> list[Piece]:
        """What there is of a parameter's weights ("master") or moments; empty: nothing."""

    def made(self, name: str) -> torch.Tensor | None:
        """A parameter that does not lie in files as it is: the whole of it, fp32. None: `pieces` has it."""
        return None

    def file(self, name: str) -> TensorFile:
        """One of the files that pieces name. Raises UserError."""
        if name not in self._open:
            try:
                self._open[name] = TensorFile(self.folder, name)
            except OSError as error:
                raise UserError(f"cannot read {self.path}/{name}: {error.strerror}") from error
        return self._open[name]

    def read(
        self,
        name: str,
        kind: str,
        offset: int,
        numel: int,
        box: Box | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Elements [offset, offset + numel) of the flattened box (None: the whole) of a parameter or moment, fp32
        [numel], in the memory of `out` if that is given; only these are read, from whatever boxes there are.

        Raises UserError when they are not all there."""
        box = box or Box.whole(self.shapes.get(name, (numel,)))
        result, filled = torch.empty(numel) if out is None else out, 0
        if kind == "master" and (whole := self.made(name)) is not None:
            for axis, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
                whole = whole.narrow(axis, start, size)
            return result.copy_(whole.flatten()[offset : offset + numel])
        for piece in self.pieces(name, kind):
            dim = box.dim if piece.box.dim is None else piece.box.dim
            if piece.box.shape != box.shape or box.dim not in (None, dim):
                raise UserError(f"{self.path} holds {name} cut as {piece.box}; it cannot be read as {box}")
            wanted = _rectangles(box, dim or 0, offset, numel)
            for there in _rectangles(piece.box, dim or 0, piece.offset, piece.numel):
                filled += sum(self._copy(piece, there, here, result) for here in wanted)
        if filled != numel:
            raise UserError(f"{self.path} holds {filled} of the {numel} elements of {kind} of {name} that are needed")
        return result

    def _copy(self, piece: Piece, there: _Rectangle, here: _Rectangle, result: torch.Tensor) -> int:
        """Copies what two rectangles have in common; returns how many elements that is."""
        rows, columns = _common(there.rows, here.rows), _common(there.columns, here.columns)
        if not rows or not columns:
            return 0
        file, begin = self.file(piece.file), there.flat(rows).start
        target = result[here.flat(rows)]
        part = slice(columns.start - there.columns.start, columns.stop - there.columns.start)
        into = slice(columns.start - here.columns.start, columns.stop - here.columns.start)
        if len(rows) == 1:
            file.read_into(piece.key, begin + part.start, target[into])
        elif columns == there.columns == here.columns:
            file.read_into(piece.key, begin, target)
        else:
            stored = torch.empty(len(rows) * len(there.columns))
            file.read_into(piece.key, begin, stored)
            target.view(len(rows), -1)[:, into] = stored.view(len(rows), -1)[:, part]
        return len(rows) * len(columns)

    def weights(self, name: str) -> torch.Tensor:
        """A whole parameter, fp32. Raises UserError when it is not there."""
        if name not in self.shapes:
            raise UserError(f"{self.path} has no parameter {name}; it is of another model")
        shape = self.shapes[name]
        return self.read(name, "master", 0, math.prod(shape)).view(shape)

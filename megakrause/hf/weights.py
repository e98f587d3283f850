"""The weights of a Hugging Face folder: safetensors, of which each rank reads the ranges that it needs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megakrause.checkpoint.fragment import Box
from megakrause.checkpoint.model import stored_config
from megakrause.checkpoint.place import open_folder
from megakrause.checkpoint.read import find_checkpoint
from megakrause.checkpoint.weights import Piece, Weights
from megakrause.config import ModelConfig
from megakrause.errors import UserError
from megakrause.hf.config import read_config
from megakrause.hf.names import from_hf
from megakrause.parallel.mesh import ALONE, Axis

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LEFT_OUT = re.compile(r".*\.rotary_emb\.inv_freq")  # that a config says, too


class HuggingFaceWeights(Weights):
    """Opening reads the index and the headers of the files."""

    def __init__(
        self,
        folder: str | Path,
        tied: bool,
        files: list[str] | None = None,
        translate: Callable[[str], str] = from_hf,
    ):
        """tied: the output projection is the embedding, whatever the files hold of it. files: None for those that the
        index names. translate: gives our name of a parameter. Raises UserError."""
        super().__init__(open_folder(folder))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, Piece] = {}
        for file in files or self._names():
            opened = self.file(file)
            for key in opened:
                if LEFT_OUT.fullmatch(key) or (name := translate(key)) == "head.output.weight" and tied:
                    continue
                self._shapes[name] = shape = self.shape_of(name, opened.shape(key))
                box = Box.whole(shape)
                self._pieces[name] = Piece(box, 0, math.prod(shape), file, key)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def pieces(self, name: str, kind: str) -> list[Piece]:
        return [self._pieces[name]] if kind == "master" and name in self._pieces else []

    def shape_of(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """That of our parameter, which has as many elements as the stored one."""
        return stored

    def _names(self) -> list[str]:
        """The files, every one of which the index says to hold something."""
        if self.folder.exists(INDEX):
            try:
                index: dict[str, Any] = json.loads(self.folder.read(INDEX))
                names = sorted(set(index["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{self.path}/{INDEX} is not readable: {error}") from error
            if odd := [name for name in names if Path(name).name != name]:
                raise UserError(f"{self.path}/{INDEX} names {odd[0]!r}, which is no file of this folder")
            return names
        if not self.folder.exists(SINGLE):
            pickles = self.folder.exists("pytorch_model.bin") or self.folder.exists("pytorch_model.bin.index.json")
            why = "its .bin files are pickles, which may run code: save it again with safetensors" if pickles else ""
            raise UserError(f"{self.path} has neither {SINGLE} nor {INDEX}{'; ' * bool(why)}{why}")
        return [SINGLE]


def find_model(path: str, axis: Axis = ALONE) -> ModelConfig:
    """The model whose weights `find_weights` finds. Raises UserError."""
    if (Path(path) / "config.json").is_file():
        return read_config(path)[0]
    return stored_config(find_checkpoint(path, axis)).model


def find_weights(path: str, axis: Axis = ALONE) -> Weights:
    """The weights of a Hugging Face folder, or of what `find_checkpoint` finds. Raises UserError."""
    if (Path(path) / "config.json").is_file():
        model, _ = read_config(path)
        return HuggingFaceWeights(path, model.tie_embeddings)
    return find_checkpoint(path, axis)

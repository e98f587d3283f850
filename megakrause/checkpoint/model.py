"""A model for evaluation, generation and conversion, from a checkpoint of any layout, without an engine."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping

import torch

from megakrause.checkpoint.read import Checkpoint
from megakrause.checkpoint.weights import Piece, Weights
from megakrause.config import ModelConfig, RunConfig
from megakrause.config_file import parse_config
from megakrause.data.huggingface_tokenizer import TOKENIZER
from megakrause.data.tokenizer import MODEL, Tokenizer
from megakrause.errors import UserError
from megakrause.models.build import build_model, whole_shapes
from megakrause.models.dual import is_of_branch, starts_as
from megakrause.models.lm import LanguageModel


def stored_config(checkpoint: Checkpoint) -> RunConfig:
    """The config that a checkpoint was made with."""
    try:
        return parse_config(tomllib.loads(checkpoint.config))
    except (ValueError, RecursionError, UserError) as error:
        raise UserError(f"{checkpoint.path}/config.toml is no config of this program: {error}") from error


def stored_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer, which every checkpoint carries. Raises UserError."""
    names = [record.name for record in checkpoint.files]
    files = {name: checkpoint.content(name) for name in names if not name.startswith(("rank-", "state.", "config."))}
    if not files.keys() & {MODEL, TOKENIZER}:
        raise UserError(f"{checkpoint.path} has no tokenizer")
    return Tokenizer(files, checkpoint.path)


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> LanguageModel:
    """The model in float32, in evaluation mode. Raises UserError when the checkpoint does not hold all of it."""
    config = stored_config(checkpoint).model
    check_shapes(checkpoint, whole_shapes(config))
    model = build_model(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(checkpoint.weights(name))
    return model.to(device).eval()


class StartingWeights(Weights):
    """The weights that a new model starts from. They may be of a model without Krause branches: these start as copies
    of the softmax branches, and what has no counterpart there is not among `shapes`: it starts as its layer says."""

    def __init__(self, weights: Weights, config: ModelConfig):
        """Raises UserError when anything else is missing, too much, or of another shape."""
        super().__init__(weights._folder)
        self._weights, there, wanted = weights, weights.shapes, whole_shapes(config)
        new = set() if any(map(is_of_branch, there)) else set(filter(is_of_branch, wanted))
        check_shapes(weights, {name: shape for name, shape in wanted.items() if name not in new})
        sources = {name: starts_as(name) if name in new else name for name in wanted}
        self._sources = {name: source for name, source in sources.items() if source in there}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        there = self._weights.shapes
        return {name: there[source] for name, source in self._sources.items()}

    def pieces(self, name: str, kind: str) -> list[Piece]:
        return self._weights.pieces(self._sources[name], kind) if name in self._sources else []


def check_shapes(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError when they are of another model than one with parameters of these shapes."""
    for name in [*expected, *weights.shapes]:
        here, there = expected.get(name, "not there"), weights.shapes.get(name, "not there")
        if here != there:
            raise UserError(f"{weights.path} is of another model: {name} is {there} in it and {here} in this one")

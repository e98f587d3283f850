"""A model for evaluation, generation and conversion, from a checkpoint of any layout, without an engine."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping

import torch

from megakrause.checkpoint.read import Checkpoint
from megakrause.checkpoint.weights import Piece, Weights
from megakrause.config import ModelConfig, RunConfig
from megakrause.config.file import parse_config
from megakrause.data.huggingface_tokenizer import TOKENIZER
from megakrause.data.tokenizer import MODEL, Tokenizer
from megakrause.errors import UserError
from megakrause.models.build import Model, build_model, whole_shapes
from megakrause.models.dual import is_of_branch, starts_as
from megakrause.models.lm import LanguageModel
from megakrause.models.lora import adapter_names, is_of_adapter, merge


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


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu", *, adapters: bool = True) -> Model:
    """The model in float32, adapters merged into it or left out, in evaluation mode. Raises UserError when the
    checkpoint does not hold all of it."""
    weights = MergedWeights(checkpoint, adapters=adapters)
    model = build_model(weights.model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(weights.weights(name))
    return model.to(device).eval()


def load_language_model(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", *, adapters: bool = True
) -> LanguageModel:
    """As `load_model`. Raises UserError also for a model that predicts no tokens."""
    model = load_model(checkpoint, device, adapters=adapters)
    if not isinstance(model, LanguageModel):
        raise UserError(f"{checkpoint.path} is a {model.config.kind}, which predicts no tokens")
    return model


class MergedWeights(Weights):
    """A checkpoint's weights with its adapters merged into them: those of `model`, which has none."""

    def __init__(self, checkpoint: Checkpoint, *, adapters: bool = True):
        """adapters: False leaves them out. Raises UserError when weights are missing, too many, or of another shape."""
        super().__init__(checkpoint.folder)
        config = stored_config(checkpoint).model
        check_shapes(checkpoint, whole_shapes(config))
        self._checkpoint, self._lora = checkpoint, config.lora if adapters else None
        self.model = config.model_copy(update={"lora": None})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self._checkpoint.shapes.items() if not is_of_adapter(name)}

    def pieces(self, name: str, kind: str) -> list[Piece]:
        return self._checkpoint.pieces(name, kind)

    def made(self, name: str) -> torch.Tensor | None:
        """What an adapter is merged into."""
        a, b = adapter_names(name)
        if self._lora is None or a not in self._checkpoint.shapes:
            return None
        weights = self._checkpoint.weights
        return merge(weights(name), weights(a), weights(b), self._lora.scale)


class StartingWeights(Weights):
    """The weights that a new model starts from. They may be of a model without Krause branches or adapters: branches
    start as copies of the softmax branches, and what has no counterpart is not among `shapes`: it starts as its layer
    says. Adapters that the new model does not have are merged."""

    def __init__(self, weights: Weights, config: ModelConfig):
        """Raises UserError when anything else is missing, too much, or of another shape."""
        super().__init__(weights.folder)
        if config.lora is None and isinstance(weights, Checkpoint):
            weights = MergedWeights(weights)
        self._weights, there, wanted = weights, weights.shapes, whole_shapes(config)
        lacking = [kind for kind in (is_of_branch, is_of_adapter) if not any(map(kind, there))]
        new = {name for name in wanted if any(kind(name) for kind in lacking)}
        check_shapes(weights, {name: shape for name, shape in wanted.items() if name not in new})
        sources = {name: starts_as(name) if name in new else name for name in wanted}
        self._sources = {name: source for name, source in sources.items() if source in there}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        there = self._weights.shapes
        return {name: there[source] for name, source in self._sources.items()}

    def pieces(self, name: str, kind: str) -> list[Piece]:
        return self._weights.pieces(self._sources[name], kind) if name in self._sources else []

    def made(self, name: str) -> torch.Tensor | None:
        return self._weights.made(self._sources[name])


def check_same_model(path: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Raises UserError when a model that starts from weights of another would compute something else with them."""
    for key in ("heads", "num_kv_heads", "head_size", "positions", "rope_theta", "rope_scaling", "norm_eps"):
        there, here = getattr(theirs, key), getattr(ours, key)
        name = {"num_kv_heads": "kv_heads", "head_size": "head_dim"}.get(key, key)
        if there != here and not (key.startswith("rope") and ours.positions == theirs.positions == "learned"):
            raise UserError(f"{path} has {name} = {there}, model.{name} is {here}; they must agree")


def check_shapes(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError when they are of another model than one with parameters of these shapes."""
    for name in [*expected, *weights.shapes]:
        here, there = expected.get(name, "not there"), weights.shapes.get(name, "not there")
        if here != there:
            raise UserError(f"{weights.path} is of another model: {name} is {there} in it and {here} in this one")

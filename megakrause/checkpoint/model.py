"""A model for evaluation, generation and conversion, from a checkpoint of any layout, without an engine."""

from __future__ import annotations

import tomllib

import torch

from megakrause.checkpoint.read import Checkpoint
from megakrause.checkpoint.weights import Weights
from megakrause.config import ModelConfig, RunConfig
from megakrause.config_file import parse_config
from megakrause.data.huggingface_tokenizer import TOKENIZER
from megakrause.data.tokenizer import MODEL, Tokenizer
from megakrause.errors import UserError
from megakrause.models.build import build_model, whole_shapes
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
    check_shapes(checkpoint, config)
    model = build_model(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(checkpoint.weights(name))
    return model.to(device).eval()


def check_shapes(weights: Weights, config: ModelConfig) -> None:
    """Raises UserError when they are of another model."""
    expected = whole_shapes(config)
    for name in [*expected, *weights.shapes]:
        here, there = expected.get(name, "not there"), weights.shapes.get(name, "not there")
        if here != there:
            raise UserError(f"{weights.path} is of another model: {name} is {there} in it and {here} in this one")

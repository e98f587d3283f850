"""State dicts of the paper's published implementation, github.com/Jingkun-Liu/Krause-Synchronization-Transformers, as
checkpoints of ours: language models whose layers have a softmax and a Krause branch."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megakrause.checkpoint.files import DTYPES, tensor_chunks, write_bytes
from megakrause.checkpoint.model import check_shapes
from megakrause.config import ModelConfig
from megakrause.errors import UserError
from megakrause.hf.config import read_sizes
from megakrause.hf.imports import imported_config, write_weights
from megakrause.hf.names import from_hf
from megakrause.hf.weights import SINGLE, HuggingFaceWeights
from megakrause.models.build import whole_shapes

WRAPPERS = ("model", "state_dict", "model_state_dict")  # under which a file may hold the state dict


def our_name(name: str) -> str:
    """Our name of a published parameter. Raises UserError for a name that has none."""
    name = re.sub(r"self_attn\.([qkvo]_proj|[qk]_norm)_krause\.", r"self_attn.krause.\1.", name.removeprefix("module."))
    name = name.replace("self_attn.gate_proj_krause.", "self_attn.gate.")
    return from_hf(name.replace("self_attn.log_sigma", "self_attn.krause.log_sigma"))


def import_state_dict(source: Path, out: Path, config: Path, window: int, top_k: int | None) -> ModelConfig:
    """Writes OUT/checkpoints/step-0 and OUT/config.toml from a state dict, .pt or .safetensors, or a folder of shards.

    config: the Hugging Face config.json that the model was made with. Nothing but tensors is ever unpickled. Returns
    what was read. Raises UserError."""
    try:
        theirs: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        tied, tree = bool(theirs.get("tie_word_embeddings")), read_sizes(theirs, config)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read {config}: {error}") from error
    except KeyError as error:
        raise UserError(f"{config} lacks {error}") from error
    with tempfile.TemporaryDirectory() as temporary:
        if source.is_dir():
            weights = PaperWeights(source, tied)
        elif source.suffix == ".safetensors":
            weights = PaperWeights(source.parent, tied, source.name)
        else:
            _unpickle(source, Path(temporary))
            weights = PaperWeights(Path(temporary), tied)
        shapes = weights.shapes
        tree |= {"attention": "dual", "window": window, "top_k": top_k}
        tree |= {name: any(key.endswith(end) for key in shapes) for name, end in FEATURES.items()}
        try:
            model = ModelConfig.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{config} does not describe a model: {error.errors()[0]['msg']}") from error
        check_shapes(weights, whole_shapes(model))
        length = int(theirs.get("max_position_embeddings", 2048))
        write_weights(weights, imported_config(model, str(source), out, length), None, out)
    return model


FEATURES = {"qkv_bias": "attention.query.bias", "qk_norm": "attention.query_norm.weight"}


class PaperWeights(HuggingFaceWeights):
    """log_sigma is [heads, 1, 1] there. A folder's shards, or one file of it."""

    def __init__(self, folder: Path, tied: bool, file: str | None = None):
        super().__init__(folder, tied, files=None if file is None else [file], translate=our_name)

    def shape_of(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        return stored[:1] if name.endswith("log_sigma") else stored


def _unpickle(source: Path, folder: Path) -> None:
    """Writes the tensors of a .pt file as safetensors. Raises UserError for one that holds anything else."""
    try:
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or hostile file makes of it
        raise UserError(f"cannot read {source}: {str(error).splitlines()[0]}") from error
    while isinstance(state, dict) and (inside := [key for key in WRAPPERS if isinstance(state.get(key), dict)]):
        state = state[inside[0]]
    if not isinstance(state, dict) or not all(
        isinstance(x, torch.Tensor) and x.dtype in DTYPES for x in state.values()
    ):
        raise UserError(f"{source} holds no state dict: names with tensors of floating-point numbers")
    write_bytes(folder, SINGLE, tensor_chunks(state, {}))

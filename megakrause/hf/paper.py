"""State dicts of the paper's published implementation, github.com/Jingkun-Liu/Krause-Synchronization-Transformers, as
checkpoints of ours: language models whose layers have a softmax and a Krause branch, vision transformers, and image
models, each with Krause attention or softmax."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megakrause.checkpoint.files import DTYPES, tensor_chunks, write_bytes
from megakrause.checkpoint.model import check_shapes
from megakrause.config import ModelConfig
from megakrause.config.file import load_config
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


def our_image_name(name: str) -> str:
    """The same for vision transformers and image models."""
    name = name.removeprefix("module.")
    if name in OUTER:
        return OUTER[name]
    found = re.fullmatch(rf"(?:layers|blocks)\.(\d+)\.({'|'.join(map(re.escape, INNER))})(\.weight|\.bias|)", name)
    if found is None:
        raise UserError(f"parameter {name} has no counterpart; it is of another kind of model")
    return f"blocks.{found[1]}.{INNER[found[2]]}{found[3]}"


OUTER = {
    "token_emb.weight": "embedding.tokens.weight",
    "pos_emb.weight": "embedding.positions.weight",
    "patch_embed.proj.weight": "embedding.weight",
    "patch_embed.proj.bias": "embedding.bias",
    "pos_embed": "embedding.positions",
    "cls_token": "embedding.cls",
}
for _end in ("weight", "bias"):
    OUTER |= {f"{norm}.{_end}": f"head.norm.{_end}" for norm in ("ln_f", "norm")}
    OUTER[f"head.{_end}"] = f"head.output.{_end}"
INNER = {"ln1": "attention_norm", "ln2": "mlp_norm", "mlp.0": "mlp.up", "mlp.2": "mlp.down"}
INNER |= {"norm1": "attention_norm", "norm2": "mlp_norm", "ffn.0": "mlp.up", "ffn.3": "mlp.down"}
_PARTS = {"out_proj": "output", "log_sigma": "core.log_sigma", "W_q": "query", "W_k": "key", "W_v": "value"}
_PARTS |= {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
INNER |= {f"{there}.{part}": f"attention.{ours}" for there in ("attn", "attention") for part, ours in _PARTS.items()}


def import_state_dict(
    source: Path, out: Path, config: Path, window: int | None = None, top_k: int | None = None
) -> ModelConfig:
    """Writes OUT/checkpoints/step-0 and OUT/config.toml from a state dict, .pt or .safetensors, or a folder of shards.

    config: of a language model, the Hugging Face config.json that it was made with, and then its window and top_k; of
    any other, a config of ours (.toml). Nothing but tensors is ever unpickled. Returns what was read. Raises
    UserError."""
    with tempfile.TemporaryDirectory() as temporary:
        if config.suffix == ".toml":
            if window is not None or top_k is not None:
                raise UserError(f"--window and --top-k go with a config.json; {config} says them itself")
            run = load_config(config)
            expected = whole_shapes(run.model)
            weights = _open(source, Path(temporary), False, our_image_name, expected)
            check_shapes(weights, expected)
            write_weights(weights, run.model_copy(update={"output": str(out)}), None, out)
            return run.model
        if window is None:
            raise UserError("--window is missing; how many keys does a query of the Krause branch see?")
        theirs, tree = _read_json(config)
        weights = _open(source, Path(temporary), bool(theirs.get("tie_word_embeddings")), our_name, {})
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


def _read_json(config: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config.json, and what it says in our words."""
    try:
        theirs: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        return theirs, read_sizes(theirs, config)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read {config}: {error}") from error
    except KeyError as error:
        raise UserError(f"{config} lacks {error}") from error


FEATURES = {"qkv_bias": "attention.query.bias", "qk_norm": "attention.query_norm.weight"}


class PaperWeights(HuggingFaceWeights):
    """A folder's shards, or one file of it. Some parameters have dims of size 1 there that they lack here, and
    log_sigma is [heads, 1, 1]."""

    def __init__(
        self,
        folder: Path,
        tied: bool,
        file: str | None,
        translate: Callable[[str], str],
        expected: Mapping[str, tuple[int, ...]],
    ):
        """expected: shapes of parameters that may be stored in others of as many elements."""
        self._expected = expected
        super().__init__(folder, tied, files=None if file is None else [file], translate=translate)

    def shape_of(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        ours = self._expected.get(name, stored[:1] if name.endswith("log_sigma") else stored)
        return ours if [n for n in ours if n > 1] == [n for n in stored if n > 1] else stored


def _open(
    source: Path, temporary: Path, tied: bool, translate: Callable[[str], str], expected: Mapping[str, tuple[int, ...]]
) -> PaperWeights:
    if source.is_dir():
        return PaperWeights(source, tied, None, translate, expected)
    if source.suffix == ".safetensors":
        return PaperWeights(source.parent, tied, source.name, translate, expected)
    _unpickle(source, temporary)
    return PaperWeights(temporary, tied, None, translate, expected)


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

"""Writes a Hugging Face folder's weights as a checkpoint, one tensor at a time."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tqdm import tqdm

from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.model import check_shapes
from megakrause.checkpoint.place import Place
from megakrause.checkpoint.weights import Weights
from megakrause.checkpoint.write import Retention, Snapshot, save_checkpoint
from megakrause.config import ModelConfig, RunConfig
from megakrause.config.file import parse_config
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError
from megakrause.hf.config import read_config
from megakrause.hf.weights import HuggingFaceWeights
from megakrause.models.build import whole_shapes
from megakrause.parallel.mesh import ALONE

UNKNOWN = "none"  # of what a config has to say and an imported model has not


def import_folder(folder: str, out: Path) -> str:
    """Writes OUT/checkpoints/step-0 from a Hugging Face folder, with its tokenizer if it has one, and OUT/config.toml,
    whose section [model] is what a run needs to go on with. Returns what was read, in words. Raises UserError."""
    model, theirs = read_config(folder)
    weights = HuggingFaceWeights(folder, model.tie_embeddings)
    check_shapes(weights, whole_shapes(model))
    tokenizer = None
    if (Path(folder) / "tokenizer.json").exists() or (Path(folder) / "tokenizer.model").exists():
        tokenizer = Tokenizer.load(folder)
    length = int(theirs.get("max_position_embeddings", 2048))
    write_weights(weights, imported_config(model, folder, out, length), tokenizer, out)
    parameters = sum(map(math.prod, weights.shapes.values()))
    return f"{theirs['architectures'][0]} with {parameters / 1e6:.1f} M parameters"


def imported_config(model: ModelConfig, folder: str, out: Path, length: int) -> RunConfig:
    """A config around a model that was not trained here. length: of its sequences, if they are of text."""
    data, train = {"train": UNKNOWN}, {"steps": 1, "global_batch": 1}
    if model.kind == "lm":
        data["tokenizer"], train["seq_len"] = folder, length
    tree = {"output": str(out), "model": model.model_dump(exclude_none=True), "data": data}
    return parse_config(tree | {"optim": {"lr": 1e-5}, "train": train})


def write_weights(weights: Weights, config: RunConfig, tokenizer: Tokenizer | None, out: Path) -> None:
    """Writes OUT as a run's folder with one checkpoint, of step 0. Raises UserError when OUT is there."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; remove it or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    shapes = weights.shapes
    with tqdm(total=4 * sum(map(math.prod, shapes.values())), desc="importing", unit="B", unit_scale=True) as bar:

        def load(fragment: Fragment) -> torch.Tensor:
            tensor = weights.read(fragment.name, "master", 0, fragment.tensor.numel())
            bar.update(tensor.nbytes)
            return tensor

        fragments = [
            Fragment(name, "master", shape, (0,) * len(shape), shape, 0, torch.empty(math.prod(shape), device="meta"))
            for name, shape in shapes.items()
        ]
        state = {"optimizer_steps": 0, "position": 0, "tokens": 0, "ranks": 1, "train_data": [], "sources": {}}
        state |= {"streams": {}, "batches": [], "guard": {}}
        state |= {"tokenizer": "" if tokenizer is None else tokenizer.fingerprint}
        text = config.to_toml().encode()
        files = {"config.toml": text, **({} if tokenizer is None else tokenizer.files)}
        snapshot = Snapshot(0, fragments, {}, state, files, load)
        save_checkpoint(Place.of(out / "checkpoints"), snapshot, ALONE, Retention(1))
    (out / "config.toml").write_bytes(text)

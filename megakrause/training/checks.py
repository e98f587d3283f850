"""What has to agree before a run starts or goes on: between ranks, and between a checkpoint and the config."""

from __future__ import annotations

import json
from pathlib import Path

from megakrause.checkpoint.model import stored_config
from megakrause.checkpoint.read import Checkpoint
from megakrause.config import RunConfig
from megakrause.config.file import load_config
from megakrause.data.images import ImageSamples
from megakrause.data.mixed import MixedWindows, describe_past
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.tokens import TokenWindows
from megakrause.errors import UserError
from megakrause.parallel.mesh import Mesh

AnySamples = MixedWindows | ImageSamples
ORDER_KEYS = ("mask_documents", "packing", "shuffle_blocks")  # of data: with them the samples change


def check_alike(config: RunConfig, mesh: Mesh) -> None:
    """Raises UserError on every rank when their configs differ."""
    for rank, other in enumerate(configs := mesh.world.gather_objects(config.flat())):
        for key, value in other.items():
            if value != configs[0][key]:
                raise UserError(
                    f"{key} = {value} on rank {rank} and {configs[0][key]} on rank 0; start all with the same config",
                    everywhere=True,
                )


def check_same_data(
    config: RunConfig, samples: MixedWindows | ImageSamples, valid: TokenWindows | ImageSamples | None, mesh: Mesh
) -> None:
    """Raises UserError on every rank when they read different data."""
    if isinstance(samples, ImageSamples) and isinstance(valid, ImageSamples) and config.model.classes is not None:
        valid.check_classes(samples.classes, samples.name)
    mine = {name: fingerprint for fingerprint, name in samples.names.items()}
    if valid is not None:
        mine |= {f"{config.data.valid} (held out)": valid.fingerprint}
    for rank, theirs in enumerate(every := mesh.world.gather_objects(mine)):
        for name, fingerprint in theirs.items():
            if fingerprint != every[0].get(name):
                raise UserError(f"{name} is not the same on rank {rank} as on rank 0; copy it again", everywhere=True)


def check_same_run(
    checkpoint: Checkpoint, config: RunConfig, samples: MixedWindows | ImageSamples, tokenizer: Tokenizer | None
) -> None:
    """Raises UserError when the checkpoint is of another model or another order of the data."""
    saved, state, path = stored_config(checkpoint), checkpoint.state, checkpoint.path
    # Frozen weights have no fp32 master weights: in another precision, they would be rounded for good.
    precisions = [("train.precision", saved.train.precision, config.train.precision)] if saved.model.lora else []
    for key, before, after in [
        *((f"model.{k}", v, getattr(config.model, k)) for k, v in saved.model),
        ("train.seq_len", saved.seq_len, config.seq_len),
        ("train.seed", saved.train.seed, config.train.seed),
        *precisions,
        *((f"data.{k}", getattr(saved.data, k), getattr(config.data, k)) for k in ORDER_KEYS),
        *((f"augment.{k}", v, getattr(config.augment, k)) for k, v in saved.augment),
        ("the tokenizer's hash", state["tokenizer"], tokenizer.fingerprint if tokenizer else ""),
    ]:
        if before != after:
            raise UserError(
                f"{path} was trained with {key} = {before}, now it is {after}; "
                "restore it, or choose another output (and train.init_from to start from these weights)"
            )
    names = state["sources"] | samples.names
    mixes = state["train_data"], samples.past(state["position"])
    if mixes[0] != mixes[1]:
        before, after = (describe_past(mix, names) for mix in mixes)
        raise UserError(
            f"{path} was trained on {before}, now data.train says {after} for that; what comes may change, what "
            "was must not: restore it, or choose another output"
        )


def check_nothing_saved(output: Path, folder: str | None) -> None:
    """Raises UserError when a run of this output has saved, or ought to have, though no checkpoint was found.

    folder: the config's checkpoint.folder."""
    try:
        before = load_config(output / "config.toml")
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        step = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    except (UserError, OSError, ValueError, KeyError):
        return  # of a run that died while it began
    if before.checkpoint.folder != folder:
        was = before.checkpoint.folder or output / "checkpoints"
        raise UserError(
            f"no checkpoint was found, and {output} is of a run with checkpoints in {was}: give it the same "
            "checkpoint.folder, or choose another output"
        )
    every = before.checkpoint.every * (2 if before.checkpoint.asynchronous else 1)
    if every and step > every and before.checkpoint.on_failure == "stop":
        raise UserError(
            f"{output} is of a run that came to step {step} and saved every {before.checkpoint.every}, and no "
            f"checkpoint is in {folder or output / 'checkpoints'}: is it there? Bring it back, or choose another output"
        )


def resolve(config: RunConfig, vocab_size: int) -> RunConfig:
    """The config with the model's vocabulary filled in. Raises UserError when it is less than the tokenizer's."""
    if config.model.vocab_size is None:
        return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})
    if config.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is less than the tokenizer's; "
            f"leave it out or use {vocab_size}"
        )
    return config

"""Writes a vision transformer's checkpoint as a Hugging Face folder: as transformers' own ViT where that computes the
same, else with its modelling file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

from megakrause.checkpoint.model import load_model, stored_config
from megakrause.checkpoint.read import Checkpoint
from megakrause.config import ModelConfig, RunConfig
from megakrause.errors import UserError
from megakrause.hf import modeling_megakrause_vit
from megakrause.hf.modeling_megakrause_vit import MegakrauseViTConfig, MegakrauseViTForImageClassification
from megakrause.models.vit import VisionTransformer

MODELING = "modeling_megakrause_vit"
OUTER = {
    "embedding.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "embedding.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "embedding.positions": "vit.embeddings.position_embeddings",
    "embedding.cls": "vit.embeddings.cls_token",
    "head.norm.weight": "vit.layernorm.weight",
    "head.norm.bias": "vit.layernorm.bias",
    "head.output.weight": "classifier.weight",
    "head.output.bias": "classifier.bias",
}
INNER = {
    **{"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after", "attention.core": "attention"},
    **{"attention.query": "attention.q_proj", "attention.key": "attention.k_proj"},
    **{"attention.value": "attention.v_proj", "attention.output": "attention.o_proj"},
    **{"mlp.gate": "mlp.gate", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
}


def hf_name(name: str) -> str:
    """The name in transformers' ViT of a parameter of `VisionTransformer`."""
    if name in OUTER:
        return OUTER[name]
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias|log_sigma)", name)
    assert found is not None
    return f"vit.layers.{found[1]}.{INNER[found[2]]}.{found[3]}"


def write_vit(source: Checkpoint, folder: Path, dtype: torch.dtype) -> float:
    """Fills a folder, reloads it and compares the logits. Returns their largest difference. Raises UserError when they
    differ by more than float32's last bits."""
    run = stored_config(source)
    model = load_model(source)
    assert isinstance(model, VisionTransformer)
    for param in model.parameters():
        param.data = param.data.to(dtype).float()
    names = source.state.get("classes") or [str(i) for i in range(run.model.classes or 0)]
    theirs = _theirs(run.model, names, dtype)
    _fill(theirs, model)
    theirs.save_pretrained(folder)
    if isinstance(theirs, MegakrauseViTForImageClassification):
        shutil.copyfile(modeling_megakrause_vit.__file__, folder / f"{MODELING}.py")
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessing(run), indent=2) + "\n", encoding="utf-8")
    return _compare(model, folder, source.path, trust=isinstance(theirs, MegakrauseViTForImageClassification))


def _theirs(model: ModelConfig, names: list[str], dtype: torch.dtype) -> PreTrainedModel:
    height, width, channels = model.image_shape
    common: dict[str, Any] = {
        "patch_size": model.patch_size,
        "num_channels": channels,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "qkv_bias": model.qkv_bias,
        "initializer_range": model.init_std,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "dtype": str(dtype).removeprefix("torch."),
    }
    plain = set(model.attention_of_layers) == {"softmax"} and model.head_size * model.heads == model.width
    usual = (model.norm, model.norm_placement, model.mlp, model.pooling) == ("layer", "pre", "gelu", "cls")
    if plain and usual and model.bias and height == width:
        config = ViTConfig(
            **common, image_size=height, hidden_act="gelu", layer_norm_eps=model.norm_eps,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, architectures=["ViTForImageClassification"],
        )  # fmt: skip
        return _in(ViTForImageClassification(config), dtype)
    ours = MegakrauseViTConfig(
        **common,
        image_size=[height, width],
        head_dim=model.head_size,
        attention=model.attention_of_layers,
        krause_top_k=model.top_k_of_layers,
        krause_sigma=model.sigma,
        radius=model.radius,
        metric=model.metric,
        shared_sigma=model.shared_sigma,
        pooling=model.pooling,
        norm=model.norm,
        post_norm=model.norm_placement == "post",
        mlp=model.mlp,
        bias=model.bias,
        norm_eps=model.norm_eps,
        architectures=["MegakrauseViTForImageClassification"],
        auto_map={
            "AutoConfig": f"{MODELING}.MegakrauseViTConfig",
            "AutoModelForImageClassification": f"{MODELING}.MegakrauseViTForImageClassification",
        },
    )
    return _in(MegakrauseViTForImageClassification(ours), dtype)


def _in(model: Any, dtype: torch.dtype) -> Any:
    return model.to(dtype)


@torch.no_grad()
def _fill(theirs: nn.Module, ours: VisionTransformer) -> None:
    """Copies every parameter. Raises KeyError when one has no counterpart."""
    left = dict(theirs.named_parameters())
    for name, param in ours.named_parameters():
        target = left.pop(hf_name(name))
        target.copy_(param.view(target.shape))
    assert not left, left.keys()


def _preprocessing(run: RunConfig) -> dict[str, Any]:
    height, width, channels = run.model.image_shape
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": run.augment.mean or [0.5] * channels,
        "image_std": run.augment.std or [0.5] * channels,
    }


@torch.no_grad()
def _compare(model: VisionTransformer, folder: Path, path: str, *, trust: bool) -> float:
    height, width, channels = model.config.image_shape
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = model.double()(images)
    reloaded = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float64)
    difference = float((reloaded.eval()(images).logits - expected).abs().max())
    tolerance = torch.finfo(torch.float32).eps * max(1.0, float(expected.abs().max()))
    if not difference <= tolerance:
        raise UserError(
            f"{path}: logits of the reloaded export differ by {difference:.1e}, more than the {tolerance:.1e} "
            "that rounding explains; nothing was written"
        )
    return difference

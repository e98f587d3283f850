"""What is refused in configs of image models and of classifiers of images: one line that says what would be legal."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megakrause.config.file import parse_config
from megakrause.errors import UserError

COMMON: dict[str, Any] = {
    "output": "runs/x",
    "data": {"train": "data/train"},
    "optim": {"lr": 0.001},
    "train": {"steps": 100, "global_batch": 8},
}
SIZES: dict[str, Any] = {"layers": 4, "width": 32, "heads": 4, "mlp_width": 64, "image_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "vit": SIZES | {"patch_size": 2, "classes": 10},
    "swin": SIZES | {"patch_size": 1, "classes": 10, "depths": [2, 2], "window": 4},
    "image": SIZES | {"window": 16},
}


def tree(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A config of a kind of model with some keys (section.key) set, or with None left out."""
    result = copy.deepcopy(COMMON | {"model": MODELS[kind] | {"kind": kind}})
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if value is None:
            del result[section][key]
        else:
            result.setdefault(section, {})[key] = value
    return result


@pytest.mark.parametrize("kind", MODELS)
def test_without_changes_they_are_legal(kind: str) -> None:
    assert parse_config(tree(kind, {})).model.kind == kind


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("vit", {"model.image_size": None}, "model.image_size is missing; a model of kind vit needs one"),
        ("vit", {"model.patch_size": None}, "model.patch_size is missing"),
        ("vit", {"model.classes": None}, "model.classes is missing"),
        ("vit", {"model.patch_size": 3}, "model.patch_size = 3 does not divide model.image_size = 8; use one of [1, 2"),
        ("vit", {"model.image_size": 0}, "model.image_size = 0 must be at least 1"),
        (
            "vit",
            {"model.attention": "dual"},
            "model.attention = 'dual' is none of kind vit; use one of ['krause', 'sof",
        ),
        (
            "vit",
            {"model.window": 8},
            "model.window is a key of model.kind = lm or image or swin, not of vit; remove it",
        ),
        ("vit", {"model.channels": 2}, "model.channels = 2 is not allowed: input should be 1 or 3"),
        ("vit", {"parallel.cp": 2}, "parallel.cp = 2: a vit is not shared so; use 1"),
        ("vit", {"model.classes": 3, "parallel.tp": 4}, "parallel.tp = 4 cannot share model.classes = 3; use at most"),
        ("vit", {"augment.mean": [0.5]}, "augment.mean = [0.5] must be 3 numbers, as model.channels"),
        ("vit", {"log.samples": 4}, "log.samples = 4: a model of kind vit draws no images"),
        ("swin", {"model.depths": None}, "model.depths is missing; a model of kind swin needs one"),
        ("swin", {"model.depths": [1, 2]}, "model.depths = [1, 2] are 3 blocks, model.layers = 4"),
        ("swin", {"model.top_k": 4}, "model.top_k = 4: a swin knows no other than None; leave it out"),
        ("swin", {"model.patch_size": 8}, "model.patch_size = 8 leaves 1 x 1 patches, no multiples of 2"),
        ("swin", {"model.window": 3}, "model.window = 3 does not divide a stage's 8 x 8 patches"),
        ("swin", {"parallel.tp": 2}, "parallel.tp = 2: a swin is not shared so; use 1"),
        ("image", {"model.window": None}, "model.window is missing"),
        ("image", {"model.vocab_size": 99}, "model.vocab_size is a key of model.kind = lm, not of image; remove it"),
        ("image", {"train.seq_len": 64}, "train.seq_len = 64: sequences of these images have 191 positions; leave it"),
        ("image", {"parallel.cp": 2}, "parallel.cp = 2 cannot share 191 positions of an image; use one of [1]"),
        ("image", {"augment.mixup": 0.5}, "section 'augment': an image model learns the images as they are"),
        ("image", {"data.tokenizer": "x.model"}, "data.tokenizer is for text; leave it out"),
        ("image", {"data.packing": "best_fit"}, "data.packing is for text; leave it out"),
        ("image", {"data.mask_documents": False}, "data.mask_documents is for text; leave it out"),
        ("vit", {"data.shuffle_blocks": 2}, "data.shuffle_blocks is for text; leave it out"),
        ("vit", {"data.train": "0.5 a 0.5 b"}, "images are read from one PREFIX"),
    ],
    ids=str,
)
def test_what_is_refused_is_named_in_one_line(kind: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_config(tree(kind, changes))
    message = str(raised.value)
    assert said in message and "\n" not in message


def test_text_has_no_samples_and_no_augmentation() -> None:
    text = COMMON | {"model": {"layers": 2, "width": 32, "heads": 4, "mlp_width": 64, "window": 16}}
    text |= {"data": {"train": "a", "tokenizer": "b"}, "train": {"steps": 1, "global_batch": 1, "seq_len": 8}}
    for extra, said in (
        ({"log": {"samples": 1}}, "log.samples = 1: a model of kind lm draws no images"),
        ({"augment": {"flip": True}}, "section 'augment' is for images; remove it"),
    ):
        with pytest.raises(UserError, match=said):
            parse_config(text | extra)

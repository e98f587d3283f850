"""Vision transformers and image models as Hugging Face folders: reloaded, they compute the same, without us."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, ViTForImageClassification

from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.model import load_language_model, load_model
from megakrause.checkpoint.place import Place
from megakrause.checkpoint.read import find_checkpoint
from megakrause.checkpoint.write import Retention, Snapshot, save_checkpoint
from megakrause.cli import main
from megakrause.config.file import parse_config
from megakrause.models.build import build_model
from megakrause.models.pictures import draw
from megakrause.models.sample import cached_step
from megakrause.parallel.mesh import ALONE

VIT: dict[str, Any] = dict(
    kind="vit", image_size=12, channels=3, patch_size=3, classes=7, layers=3, width=16, heads=4, mlp_width=24,
    init_std=0.3,
)  # fmt: skip
KRAUSE: dict[str, Any] = dict(top_k=2, top_k_last=5, radius=1)
IMAGE: dict[str, Any] = dict(
    kind="image", image_size=[6, 5], channels=3, layers=2, width=16, heads=4, mlp_width=24, init_std=0.3
)
VITS: dict[str, dict[str, Any]] = {
    "krause": KRAUSE,
    "krause post-norm": KRAUSE | {"norm_placement": "post", "shared_sigma": False},
    "krause by the mean, chebyshev": KRAUSE | {"pooling": "mean", "metric": "chebyshev", "image_size": [12, 9]},
    "mixed, swiglu, rms": KRAUSE | {"attention": ["softmax", "krause", "softmax"], "mlp": "swiglu", "norm": "rms"},
    "softmax": {"attention": "softmax"},
    "softmax post-norm": {"attention": "softmax", "norm_placement": "post", "qkv_bias": False},
}


def checkpoint(folder: Path, model: dict[str, Any]) -> str:
    """Of random weights, as a run leaves it."""
    folder.mkdir()
    tree = {"output": str(folder), "model": model, "data": {"train": "x"}, "optim": {"lr": 1e-3}}
    config = parse_config(tree | {"train": {"steps": 1, "global_batch": 1}})
    built = build_model(config.model, seed=3)
    fragments = []
    for i, (name, param) in enumerate(built.named_parameters()):
        if name.endswith(("bias", "norm.weight", "log_sigma")):  # which would hide mistakes as they are at first
            param.data += 0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(i))
        shape = tuple(param.shape)
        fragments.append(Fragment(name, "master", shape, (0,) * len(shape), shape, 0, param.detach().flatten()))
    state = {"optimizer_steps": 0, "position": 0, "tokens": 0, "ranks": 1, "train_data": [], "sources": {}}
    state |= {"streams": {}, "batches": [], "guard": {}, "tokenizer": ""}
    snapshot = Snapshot(1, fragments, {}, state, {"config.toml": config.to_toml().encode()})
    save_checkpoint(Place.of(folder / "checkpoints"), snapshot, ALONE, Retention(1))
    return str(folder)


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_a_vit_is_reloaded_with_equal_logits(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = checkpoint(tmp_path / "run", VIT | VITS[name])
    out = tmp_path / "out"
    assert main(["convert", "to-hf", run, str(out)]) == 0
    ours = load_model(find_checkpoint(run)).double()
    assert len(list(out.glob("*.py"))) == (name != "softmax")
    theirs = AutoModelForImageClassification.from_pretrained(out, trust_remote_code=name != "softmax").double()
    assert isinstance(theirs, ViTForImageClassification) == (name == "softmax")
    height, width, _ = ours.config.image_shape
    images = torch.randn(3, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(theirs(images).logits, ours(images), rtol=0, atol=1e-6)
    labels = torch.tensor([1, 0, 6])
    loss = theirs(images, labels=labels).loss.double()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(ours(images), labels), rtol=1e-5, atol=1e-5)
    preprocessing = json.loads((out / "preprocessor_config.json").read_text())
    assert preprocessing["size"] == {"height": height, "width": width} and preprocessing["image_mean"] == [0.5] * 3


@pytest.mark.parametrize("attention", ["krause", "softmax"])
@torch.no_grad()
def test_an_image_model_is_reloaded_and_draws_the_same(tmp_path: Path, attention: str) -> None:
    windows = {"window": 9, "top_k": 5} if attention == "krause" else {}
    run = checkpoint(tmp_path / "run", IMAGE | {"attention": attention} | windows)
    assert main(["convert", "to-hf", run, str(tmp_path / "out")]) == 0
    ours = load_language_model(find_checkpoint(run))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert theirs.config.image_shape == [6, 5, 3]
    known = torch.tensor([[9, 200, 4], [77, 0, 255]])
    drawn = draw(cached_step(ours), ours.config, known, temperature=0)
    total = math.prod(ours.config.image_shape)
    found = theirs.generate(known, attention_mask=torch.ones_like(known), max_new_tokens=total - 3)
    assert torch.equal(found, torch.from_numpy(drawn.reshape(2, -1)).long())
    # And back.
    assert main(["convert", "from-hf", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    back = load_language_model(find_checkpoint(tmp_path / "back"))
    assert (back.config.kind, back.config.image_shape) == ("image", ours.config.image_shape)
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), ours.parameters(), strict=True))


def test_an_export_needs_nothing_of_this_project(tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run", VIT | KRAUSE)
    assert main(["convert", "to-hf", run, str(tmp_path / "out")]) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "elsewhere")
    code = (
        "import sys, torch; sys.modules['megakrause'] = None\n"
        "from transformers import AutoModelForImageClassification as A\n"
        f"m = A.from_pretrained({str(tmp_path / 'elsewhere')!r}, trust_remote_code=True)\n"
        "print(tuple(m(torch.zeros(2, 3, 12, 12)).logits.shape))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout.strip() == "(2, 7)", ended.stderr

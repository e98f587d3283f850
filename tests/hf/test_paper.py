"""Whole language models of the published implementation: logits, loss and every gradient (tests/golden/README.md)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from megakrause.checkpoint.model import load_model
from megakrause.checkpoint.read import find_checkpoint
from megakrause.cli import main
from megakrause.hf.paper import our_image_name, our_name
from tests.hf.test_import import Canary
from tests.ops.test_golden import TOLERANCE, read

MODELS = ["llama_dual_tiny", "qwen_dual_tiny"]
CONFIG = """
output = "runs/paper"
[data]
train = "images"
[optim]
lr = 1e-3
[train]
steps = 1
global_batch = 1
[model]
layers = {layers}
width = {dim}
heads = {heads}
"""
IMAGE_MODELS = {
    "karm_tiny": "kind = 'image'\nimage_size = [4, 8]\nmlp_width = 128\nwindow = 16\ntop_k = 8",
    "karm_tiny_softmax": "kind = 'image'\nimage_size = [4, 8]\nmlp_width = 128\nattention = 'softmax'",
    "kvit_cifar_tiny": "kind = 'vit'\nimage_size = 32\npatch_size = 4\nclasses = 10\nmlp_width = 64\n"
    "norm_placement = 'post'\ntop_k = 2\ntop_k_last = 4",
}


def write(name: str, folder: Path, form: str) -> tuple[list[str], dict[str, Tensor]]:
    """A golden model in the published format. Returns what `from-paper` needs to read it, and the golden tensors."""
    tensors, hyper = read(name)
    state = {key.removeprefix("param."): t for key, t in tensors.items() if key.startswith("param.")}
    source = folder / f"state.{form}"
    match form:
        case "safetensors":
            save_file(state, source)
        case "pt":
            torch.save({"model": {f"module.{key}": t for key, t in state.items()}, "epoch": 2}, source)
        case "folder":
            source.mkdir()
            parts = {f"{i}.safetensors": dict(list(state.items())[i::2]) for i in range(2)}
            for file, part in parts.items():
                save_file(part, source / file)
            index = {"weight_map": {key: file for file, part in parts.items() for key in part}}
            (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(hyper["config"])
    krause = json.loads(hyper["krause"])
    options = ["--window", str(krause["window_size"]), "--top-k", str(krause["top_k"])]
    return [str(source), str(folder / "ours"), "--config", str(folder / "config.json"), *options], tensors


@pytest.mark.parametrize("form", ["safetensors", "pt", "folder"])
@pytest.mark.parametrize("name", MODELS)
def test_golden_model(name: str, form: str, tmp_path: Path) -> None:
    arguments, expected = write(name, tmp_path, form)
    assert main(["convert", "from-paper", *arguments]) == 0
    model = load_model(find_checkpoint(tmp_path / "ours"))
    tokens = expected["tokens"]
    logits = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    found: dict[str, Any] = {"output": logits, "loss": loss.view(1)}
    gradients = {name: param.grad for name, param in model.named_parameters()}
    theirs = {our_name(key.removeprefix("grad.")): key for key in expected if key.startswith("grad.")}
    assert theirs.keys() == gradients.keys()
    found |= {theirs[name]: gradient for name, gradient in gradients.items()}
    for key, value in found.items():
        wanted = expected[key].view(value.shape)
        assert (value - wanted).norm() <= TOLERANCE * wanted.norm(), key


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_golden_model_with_a_cache(name: str, tmp_path: Path) -> None:
    """Which the published code computes otherwise than without."""
    arguments, expected = write(name, tmp_path, "safetensors")
    assert main(["convert", "from-paper", *arguments]) == 0
    model = load_model(find_checkpoint(tmp_path / "ours"))
    cache, parts = model.new_cache(), expected["tokens"].split([7, *[1] * 20, 13], dim=1)
    logits = torch.cat([model(part, cache=cache) for part in parts], dim=1)
    assert (logits - expected["output"]).norm() <= TOLERANCE * expected["output"].norm()


def test_golden_model_goes_out_to_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    arguments, expected = write("llama_dual_tiny", tmp_path, "safetensors")
    assert main(["convert", "from-paper", *arguments]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "ours"), str(tmp_path / "hf")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    logits = model(expected["tokens"]).logits
    assert (logits - expected["output"]).norm() <= TOLERANCE * expected["output"].norm()


@torch.no_grad()
def test_a_tied_head_that_is_stored_too(tmp_path: Path) -> None:
    arguments, expected = write("llama_dual_tiny", tmp_path, "pt")
    source, config = Path(arguments[0]), tmp_path / "config.json"
    state = torch.load(source, weights_only=True)["model"]
    state["module.lm_head.weight"] = state["module.model.embed_tokens.weight"]
    torch.save(state, source)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    assert main(["convert", "from-paper", *arguments]) == 0
    model = load_model(find_checkpoint(tmp_path / "ours"))
    assert model.head is not None and model.embedding is not None
    assert model.head.output.weight is model.embedding.tokens.weight
    assert model(expected["tokens"]).shape == expected["output"].shape


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a pickle that runs code", "cannot read"),
        ("no state dict", "holds no state dict"),
        ("another model", "has no counterpart"),
        ("a layer more in the config", "blocks.2.attention_norm.weight is not there in it"),
        ("no config", "config.json: "),
        ("half a config", "config.json lacks 'num_hidden_layers'"),
        ("a config that is a list", "cannot read"),
        ("a mask in the state", "names with tensors of floating-point numbers"),
    ],
)
def test_what_cannot_be_read(how: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, _ = write("llama_dual_tiny", tmp_path, "pt")
    source, config = Path(arguments[0]), tmp_path / "config.json"
    match how:
        case "a pickle that runs code":
            source.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
        case "no state dict":
            torch.save({"a": [1, 2]}, source)
        case "another model":
            torch.save({"transformer.wte.weight": torch.zeros(3)}, source)
        case "a layer more in the config":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
        case "no config":
            config.unlink()
        case "half a config":
            config.write_text('{"hidden_size": 32}')
        case "a config that is a list":
            config.write_text("[]")
        case "a mask in the state":
            torch.save({"mask": torch.ones(3, dtype=torch.bool)}, source)
    assert main(["convert", "from-paper", *arguments]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not (tmp_path / "canary").exists() and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_golden_image_model(name: str, form: str, tmp_path: Path) -> None:
    expected, hyper = read(name)
    (tmp_path / "run.toml").write_text(CONFIG.format(**hyper) + IMAGE_MODELS[name])
    state = {key.removeprefix("param."): t for key, t in expected.items() if key.startswith("param.")}
    source = tmp_path / f"state.{form}"
    torch.save({"model": state}, source) if form == "pt" else save_file(state, source)
    arguments = [str(source), "--config", str(tmp_path / "run.toml"), str(tmp_path / "ours")]
    assert main(["convert", "from-paper", *arguments]) == 0
    model = load_model(find_checkpoint(tmp_path / "ours"))
    found: dict[str, Any] = {}
    if "tokens" in expected:
        found["output"] = model(expected["tokens"])
        found["loss"] = F.cross_entropy(found["output"].flatten(0, 1), expected["targets"].flatten()).view(1)
        found["loss"].backward()
    else:
        images = expected["input"].requires_grad_()
        found["output"] = model(images)
        found["output"].backward(expected["output_grad"])
        found["input_grad"] = images.grad
    gradients = {name: param.grad for name, param in model.named_parameters()}
    theirs = {our_image_name(key.removeprefix("grad.")): key for key in expected if key.startswith("grad.")}
    assert theirs.keys() == gradients.keys()
    found |= {theirs[name]: gradient for name, gradient in gradients.items()}
    for key, value in found.items():
        wanted = expected[key].view(value.shape)
        # A key's bias adds the same to all scores of a softmax row: its gradient is zero but for rounding.
        like = wanted if wanted.norm() > 1e-12 else expected[key.replace("k_proj", "q_proj")]
        assert (value - wanted).norm() <= TOLERANCE * like.norm(), key

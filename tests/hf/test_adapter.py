"""Adapters go out as PEFT folders, onto the base that they were trained on and no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from megakrause.checkpoint.model import load_model
from megakrause.checkpoint.read import find_checkpoint
from megakrause.cli import main
from tests.hf.test_import import FAMILIES, QWEN, make, relative
from tests.training.conftest import CONFIG
from tests.training.runs import train

LORA = """
[model.lora]
rank = 4
alpha = 8.0
"""
SOFTMAX = ["model.attention=softmax", "model.window=none", "model.top_k=none"]
BRANCHES = {"plain": SOFTMAX, "dual": ["model.attention=dual"]}


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: a Qwen2 of transformers; plain, dual: runs that adapted it."""
    folder = tmp_path_factory.mktemp("adapter")
    FAMILIES["adapted"] = (Qwen2Config, {"vocab_size": 320, "num_hidden_layers": 2, "num_key_value_heads": 4})
    make("adapted", folder / "hf")
    (folder / "config.toml").write_text(CONFIG.format(data=corpus, folder=folder) + LORA)
    for name, attention in BRANCHES.items():
        targets = {"plain": '["query", "down"]', "dual": '["attention.query", "krause.output", "value", "gate"]'}[name]
        common = [*QWEN, *attention, f"train.init_from={folder}/hf", f"model.lora.targets={targets}"]
        train(folder / "config.toml", *common, f"output={folder}/{name}")
    assert main(["convert", "to-hf", str(folder / "dual"), str(folder / "base"), "--without-adapters"]) == 0
    return folder


@torch.no_grad()
@pytest.mark.parametrize(("run", "base"), [("plain", "hf"), ("dual", "base")])
def test_an_adapter_on_its_base_is_the_merged_model(trained: Path, tmp_path: Path, run: str, base: str) -> None:
    assert main(["convert", "to-peft", str(trained / run), str(trained / base), str(tmp_path / "adapter")]) == 0
    x = torch.randint(320, (2, 100), generator=torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(trained / base, trust_remote_code=True)
    before = plain(x).logits
    found = PeftModel.from_pretrained(plain, tmp_path / "adapter")(x).logits
    expected = load_model(find_checkpoint(trained / run))(x)
    assert relative(found, expected) < 1e-5 and relative(before, expected) > 1e-3
    assert main(["convert", "to-hf", str(trained / run), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert relative(merged(x).logits, expected) < 1e-5
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = {key.split(".lora_")[0].split("layers.0.")[1] for key in tensors if "layers.0." in key}
    assert (
        names
        == {
            "plain": {"self_attn.q_proj", "mlp.down_proj"},
            "dual": {"self_attn.q_proj", "self_attn.krause.o_proj", "mlp.gate_proj"}
            | {"self_attn.v_proj", "self_attn.krause.v_proj"},
        }[run]
    )


@torch.no_grad()
def test_a_base_in_16_bits_is_the_same_base(trained: Path, tmp_path: Path) -> None:
    arguments = ["convert", "to-hf", str(trained / "dual"), str(tmp_path / "base"), "--without-adapters"]
    assert main([*arguments, "--dtype", "bfloat16"]) == 0
    assert main(["convert", "to-peft", str(trained / "dual"), str(tmp_path / "base"), str(tmp_path / "out")]) == 0


def test_a_trained_adapter_is_what_peft_trains_on(trained: Path, tmp_path: Path) -> None:
    assert main(["convert", "to-peft", str(trained / "plain"), str(trained / "hf"), str(tmp_path / "out")]) == 0
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(trained / "hf"), tmp_path / "out", is_trainable=True
    )
    tokens = torch.arange(50)[None]
    model(tokens, labels=tokens).loss.backward()
    trained_params = [param for param in model.parameters() if param.requires_grad]
    assert len(trained_params) == 2 * 2 * 2 and all(param.grad.any() for param in trained_params)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("another base", "is not the base of these adapters: blocks.1.mlp.up.weight is another in"),
        ("a base of another size", "is not the base of these adapters"),
        ("a plain base of a dual model", "of a model with Krause branches write one with"),
        ("no adapters", "has no adapters; its config has no [model.lora]"),
        ("code that is not ours", "has code that is not this version's and is not run"),
        ("other positions", "is not the base of these adapters"),
        ("a truncated shard", "is no readable safetensors file"),
        ("a folder in its place", "exists and is no earlier export"),
    ],
)
def test_what_cannot_be_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, said: str
) -> None:
    run, base, out = trained / "plain", tmp_path / "base", tmp_path / "out"
    shutil.copytree(trained / ("base" if how == "code that is not ours" else "hf"), base)
    weights = base / "model.safetensors"
    match how:
        case "another base":
            tensors = load_file(weights)
            tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.1
            save_file(tensors, weights, {"format": "pt"})
        case "a base of another size":
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        case "a plain base of a dual model":
            run = trained / "dual"
        case "no adapters":
            assert main(["convert", "from-hf", str(trained / "hf"), str(tmp_path / "run")]) == 0
            run = tmp_path / "run"
        case "code that is not ours":
            run = trained / "dual"
            code = base / "modeling_megakrause.py"
            code.write_text(code.read_text() + f"\nopen({str(tmp_path / 'canary')!r}, 'w')\n")
        case "other positions":
            config = json.loads((base / "config.json").read_text())
            config["rope_parameters"]["rope_theta"] = 5e5
            (base / "config.json").write_text(json.dumps(config))
        case "a truncated shard":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "a folder in its place":
            out.mkdir()
    capsys.readouterr()
    assert main(["convert", "to-peft", str(run), str(base), str(out)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not (tmp_path / "canary").exists() and (how == "a folder in its place") == out.exists()

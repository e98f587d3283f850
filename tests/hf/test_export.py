"""A checkpoint becomes a Hugging Face folder that stands alone and computes the same."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.model import load_model
from megakrause.checkpoint.place import Place
from megakrause.checkpoint.read import find_checkpoint
from megakrause.checkpoint.write import Retention, Snapshot, save_checkpoint
from megakrause.config.file import parse_config
from megakrause.data.tokenizer import Tokenizer, train_tokenizer
from megakrause.errors import UserError
from megakrause.hf import export as module
from megakrause.hf.export import export
from megakrause.hf.names import from_hf, to_hf
from megakrause.models.build import build_model
from megakrause.parallel.mesh import ALONE

TINY: dict[str, Any] = dict(layers=3, width=24, heads=4, kv_heads=2, mlp_width=40, window=8, top_k=5)
SOFTMAX: dict[str, Any] = {"attention": "softmax", "window": None, "top_k": None}
KRAUSE, LLAMA, QWEN = "MegakrauseForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM"
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "krause": ({}, KRAUSE),
    "wide": ({"window": 40, "top_k": None, "tie_embeddings": True, "head_dim": 10}, KRAUSE),
    "softmax window": ({"attention": "softmax_window"}, KRAUSE),
    "mixed": ({"attention": ["softmax", "krause", "softmax"], "qkv_bias": True, "rope_theta": 500.0}, KRAUSE),
    "learned": ({"positions": "learned", "max_positions": 50, "norm_eps": 1e-3}, KRAUSE),
    "softmax": (SOFTMAX | {"rope_theta": 500.0, "norm_eps": 1e-3}, LLAMA),
    "softmax tied": (SOFTMAX | {"tie_embeddings": True, "head_dim": 10}, LLAMA),
    "softmax biased": (SOFTMAX | {"qkv_bias": True, "head_dim": 10, "kv_heads": 1}, QWEN),
    "softmax odd": (SOFTMAX | {"heads": 5, "kv_heads": None, "head_dim": 6}, KRAUSE),
    "softmax learned": (SOFTMAX | {"positions": "learned", "max_positions": 100}, KRAUSE),
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = [Path(__file__).read_text()]
    return train_tokenizer(text, 401, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def make(tmp_path: Path, tokenizer: Tokenizer) -> Make:
    steps = itertools.count(1)

    def make(seed: int = 0, **model: Any) -> Path:
        """A checkpoint of a model whose weights have none of their initial values."""
        config = parse_config(
            {
                "output": "run",
                "model": {k: v for k, v in (TINY | model).items() if v is not None} | {"vocab_size": 403},
                "data": {"train": "corpus", "tokenizer": "tokenizer.model"},
                "optim": {"lr": 1e-3},
                "train": {"steps": 1, "global_batch": 1, "seq_len": 48},
            }
        )
        generator = torch.Generator().manual_seed(seed)
        fragments = []
        for name, p in build_model(config.model, seed).named_parameters():
            shape, tensor = tuple(p.shape), p.detach() + 0.3 * torch.randn(p.shape, generator=generator)
            fragments.append(Fragment(name, "master", shape, (0,) * len(shape), shape, 0, tensor.flatten()))
        files = {"config.toml": config.to_toml().encode(), "tokenizer.model": Path(tokenizer.path).read_bytes()}
        place, step = Place.of(tmp_path / "run" / "checkpoints"), next(steps)
        place.clean()
        state = {"tokenizer": tokenizer.fingerprint}
        save_checkpoint(place, Snapshot(step, fragments, {}, state, files), ALONE, Retention(1))
        return tmp_path / "run" / "checkpoints" / f"step-{step}"

    return make


def reload(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_an_export_is_the_same_model(case: str, make: Make, tmp_path: Path) -> None:
    changes, architecture = CASES[case]
    checkpoint, out = make(**changes), tmp_path / "out"
    difference = export(str(checkpoint), out)
    assert difference < (1e-10 if architecture == KRAUSE else 1e-4)

    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert ("auto_map" in config) == (architecture == KRAUSE) == (out / "modeling_megakrause.py").exists()
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    code = {"modeling_megakrause.py"} if architecture == KRAUSE else set()
    assert {path.name for path in out.iterdir()} == names | code | {"megakrause_export.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]

    source = find_checkpoint(checkpoint)
    stored = load_file(out / "model.safetensors")
    assert {from_hf(name) for name in stored} == source.shapes.keys()
    assert all(torch.equal(stored[to_hf(name)], source.weights(name)) for name in source.shapes)

    ours, theirs = load_model(source), reload(out)
    tokens = torch.randint(0, 403, (2, 50), generator=torch.Generator().manual_seed(1))
    if ours.config.top_k is None:
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    again = reload(tmp_path / "again")
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    assert (tmp_path / "again" / "modeling_megakrause.py").exists() == (architecture == KRAUSE)


@pytest.mark.parametrize("case", ["mixed", "softmax"])
def test_text_goes_in_and_out(case: str, make: Make, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The folder's tokenizer and model together, on texts of different lengths."""
    export(str(make(**CASES[case][0])), tmp_path / "out")
    theirs, model = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True), reload(tmp_path / "out")
    texts = ["def f(x):\n    return x\n", "import os", "\u2581 <|endoftext|>\0"]
    assert theirs(texts)["input_ids"] == [[tokenizer.eos, *tokenizer.encode(text)] for text in texts]
    batch = theirs(texts, padding=True, return_tensors="pt")
    found = model.generate(**batch, max_new_tokens=30)
    for text, row in zip(texts, found, strict=True):
        alone = model.generate(**theirs(text, return_tensors="pt"), max_new_tokens=30)[0]
        start = int((row == tokenizer.eos).nonzero()[0])
        ids = [tokenizer.eos, *tokenizer.encode(text)]
        assert row[start : start + len(ids)].tolist() == ids
        assert row[start : start + len(alone)].tolist() == alone.tolist()
        assert theirs.decode(row[: start + len(ids)], skip_special_tokens=True) == text


ALONE_SCRIPT = """
import sys
sys.modules["megakrause"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("import os", return_tensors="pt").input_ids
print()
print(ids.tolist()[0])
print(model.generate(ids, max_new_tokens=20).tolist()[0])
"""


def test_a_folder_stands_alone(make: Make, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Without this package, the network, or anything in the home."""
    checkpoint = make(top_k=None)
    export(str(checkpoint), tmp_path / "out")
    (tmp_path / "home").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", ALONE_SCRIPT, str(tmp_path / "out")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,  # nobody to ask whether to trust the folder's code
    )
    assert found.returncode == 0, found.stderr
    ids, generated = (json.loads(line) for line in found.stdout.splitlines()[-2:])
    assert ids == [tokenizer.eos, *tokenizer.encode("import os")]

    ours = load_model(find_checkpoint(checkpoint))
    cache, tokens, expected = ours.new_cache(), torch.tensor([ids]), list(ids)
    while len(expected) < len(ids) + 20 and expected[len(ids) :][-1:] != [tokenizer.eos]:
        with torch.no_grad():
            tokens = ours(tokens, cache=cache)[:, -1:].argmax(-1)
        expected.append(int(tokens))
    assert generated == expected


def test_shards(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make()
    monkeypatch.setattr(module, "SHARD_SIZE", 30_000)
    assert export(str(checkpoint), tmp_path / "out") < 1e-10
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    source = find_checkpoint(checkpoint)
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["metadata"]["total_size"] == 4 * sum(source.weights(name).numel() for name in source.shapes)
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(4 * tensor.numel() for tensor in tensors.values()) <= 30_000


def test_an_earlier_export_is_replaced_whatever_it_was(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changes in ({}, SOFTMAX, {"attention": ["softmax", "krause", "softmax"]}, {"qkv_bias": True}):
        export(str(make(**changes)), out)
        assert (out / "modeling_megakrause.py").exists() == (changes is not SOFTMAX)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_other_folders_are_not_touched(make: Make, tmp_path: Path) -> None:
    checkpoint = str(make())
    out = tmp_path / "out"
    for create in (lambda: out.write_text("mine"), lambda: (out.unlink(), out.mkdir())):
        create()
        with pytest.raises(UserError, match="exists and is no earlier export"):
            export(checkpoint, out)
        assert out.exists()


def test_a_wrong_export_leaves_the_earlier_one(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(str(make()), tmp_path / "out")
    marker = (tmp_path / "out" / "megakrause_export.json").read_bytes()
    swapped = {"gate": "up", "up": "gate"}

    def wrong(name: str) -> str:
        *front, last, kind = name.split(".")
        return to_hf(".".join([*front, swapped.get(last, last), kind]))

    monkeypatch.setattr(module, "to_hf", wrong)
    with pytest.raises(UserError, match=r"logits of the reloaded export differ by .*; nothing was written"):
        export(str(make(seed=1)), tmp_path / "out")
    assert (tmp_path / "out" / "megakrause_export.json").read_bytes() == marker
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize(
    ("case", "name", "value"),
    [(case, "rms_norm_eps", 2e-3) for case in ("krause", "softmax", "softmax biased")]
    + [(case, "rope", 1.001) for case in ("krause", "softmax", "softmax biased")]
    + [("krause", "krause_window", 9), ("krause", "krause_top_k", 6)],
)
def test_small_faults_are_seen(
    case: str, name: str, value: float, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, architecture = CASES[case]
    right = module.hf_config

    def wrong(*arguments: Any) -> Any:
        config = right(*arguments)
        if name != "rope":
            setattr(config, name, value)
        elif architecture == KRAUSE:
            config.rope_theta *= value
        else:
            config.rope_parameters["rope_theta"] *= value
        return config

    monkeypatch.setattr(module, "hf_config", wrong)
    with pytest.raises(UserError, match="logits of the reloaded export differ"):
        export(str(make(**changes | {"norm_eps": 1e-3})), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_checkpoint(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a checkpoint"):
        export(str(tmp_path), tmp_path / "out")
    checkpoint = make()
    with open(checkpoint / "rank-00000.safetensors", "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(UserError, match="is damaged"):
        export(str(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_go_both_ways(make: Make) -> None:
    for changes in ({"qkv_bias": True}, {"positions": "learned", "max_positions": 50}):
        for name in find_checkpoint(make(**changes)).shapes:
            assert from_hf(to_hf(name)) == name
    for name in ("blocks.0.mlp.gate", "blocks.x.mlp.gate.weight", "model.norm.weight", ""):
        with pytest.raises(UserError, match="has no counterpart"):
            to_hf(name)
    with pytest.raises(UserError, match="model.layers.0.self_attn.z_norm.weight has no counterpart"):
        from_hf("model.layers.0.self_attn.z_norm.weight")

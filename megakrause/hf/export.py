"""Writes a checkpoint as a Hugging Face folder.

OUT/
    config.json  generation_config.json    softmax layers with rotary positions are a Llama, with biases a Qwen2;
    modeling_megakrause.py                 any other model brings this file and loads with trust_remote_code=True
    model.safetensors                      or model-0000x-of-0000y.safetensors and model.safetensors.index.json
    tokenizer.json  tokenizer_config.json  and what else a Hugging Face tokenizer has
    megakrause_export.json                 last: marks the folder as an export, complete and compared
"""

from __future__ import annotations

import filecmp
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from megakrause.checkpoint.files import flush_folder, tensor_chunks, write_bytes
from megakrause.checkpoint.model import MergedWeights, load_language_model, stored_config, stored_tokenizer
from megakrause.checkpoint.read import Checkpoint, find_checkpoint
from megakrause.checkpoint.weights import Weights
from megakrause.config import ModelConfig, RunConfig
from megakrause.errors import UserError
from megakrause.hf import modeling_megakrause
from megakrause.hf.export_vision import write_vit
from megakrause.hf.modeling_megakrause import MegakrauseConfig
from megakrause.hf.names import to_hf
from megakrause.hf.tokenizer import write_tokenizer
from megakrause.models.lm import LanguageModel

MARKER = "megakrause_export.json"
MODELING = "modeling_megakrause"
AUTO_MAP = {
    "AutoConfig": f"{MODELING}.MegakrauseConfig",
    "AutoModelForCausalLM": f"{MODELING}.MegakrauseForCausalLM",
}
SHARD_SIZE = 5 * 10**9  # bytes
# A Krause layer looks back a window, however long the text is. What limits the length then is float32: rotation angles
# at position 2^17 are 2^-7 apart.
LONGEST = 2**17


def export(checkpoint: str, out: Path, dtype: torch.dtype = torch.float32, *, adapters: bool = True) -> float:
    """Writes OUT with weights of a dtype, reloads it with transformers and compares the logits with our own model's.

    adapters: merged into the weights, or left out. Returns the largest absolute difference. Raises UserError when OUT
    is there and no earlier export, when there is no sound checkpoint, when its tokenizer has no exact form in Hugging
    Face's format, or when the logits differ."""
    source = find_checkpoint(checkpoint)
    with staged(out, source.step) as (folder, marker):
        if (kind := stored_config(source).model.kind) == "swin":
            raise UserError(f"{source.path} is a swin, which has no form in transformers yet")
        if kind == "vit":
            marker["max_logit_difference"] = difference = write_vit(source, folder, dtype)
            return difference
        _write(source, folder, dtype, adapters)

        @torch.no_grad()
        def ours() -> LanguageModel:
            model = load_language_model(source, adapters=adapters)
            for param in model.parameters():
                param.copy_(param.to(dtype))
            return model

        difference = compare_logits(ours, lambda: load_float64(folder, trust_remote_code=True), source.path)
        marker["max_logit_difference"] = difference
    return difference


@contextmanager
def staged(out: Path, step: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder to write and what its marker will say. OUT appears by a rename, whole; an earlier export is moved out of
    its way just before. Raises UserError when OUT is anything else."""
    out = out.resolve()
    if out.exists() and not (out / MARKER).is_file():
        raise UserError(f"{out} exists and is no earlier export; remove it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        marker: dict[str, Any] = {"format": 1, "step": step}
        yield folder, marker
        (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        flush_folder(folder)
        if out.exists():
            out.rename(Path(temporary) / "earlier")
        folder.rename(out)
        flush_folder(out.parent)


def _write(source: Checkpoint, folder: Path, dtype: torch.dtype, adapters: bool) -> None:
    config = stored_config(source)
    limit = max_length(config)
    special_ids: dict[str, int] = {}
    if source.state["tokenizer"]:  # an imported model may have none
        special_ids = write_tokenizer(stored_tokenizer(source), folder, limit)
    theirs = hf_config(config.model, limit, special_ids, dtype)
    theirs.save_pretrained(folder)
    GenerationConfig(do_sample=False, **special_ids).save_pretrained(folder)
    if isinstance(theirs, MegakrauseConfig):
        shutil.copyfile(modeling_megakrause.__file__, folder / f"{MODELING}.py")
    _write_weights(MergedWeights(source, adapters=adapters), folder, dtype)


def max_length(config: RunConfig) -> int:
    """Tokens that the model can read at once: its table of positions, or what its softmax layers were trained on."""
    if config.model.positions == "learned":
        assert config.model.num_positions is not None
        return config.model.num_positions
    return config.seq_len if None in config.model.window_of_layers else LONGEST


def hf_config(
    model: ModelConfig, max_length: int, special_ids: dict[str, int], dtype: torch.dtype = torch.float32
) -> PretrainedConfig:
    """The config of the transformers model that computes the same: Llama, Qwen2 or Qwen3 where they can, else our own.

    Biases make it a Qwen2, which has them where qkv_bias has them; Llama's attention_bias adds one to the output
    projection. special_ids: bos_token_id and so on."""
    common: dict[str, Any] = special_ids | {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "max_position_embeddings": max_length,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
    }
    llama = (model.norm, model.norm_placement, model.mlp, model.bias) == ("rms", "pre", "swiglu", False)
    plain = llama and model.positions == "rope" and set(model.attention_of_layers) == {"softmax"}
    rope = {"rope_type": "default", "rope_theta": model.rope_theta} | _stretched(model)
    even = model.width % model.heads == 0  # which Llama and Qwen2 insist on, whatever head_dim is
    match plain, model.qkv_bias, model.qk_norm:
        case True, False, False if even:
            return LlamaConfig(**common, rope_parameters=rope, architectures=["LlamaForCausalLM"])
        case True, True, False if even:
            return Qwen2Config(**common, rope_parameters=rope, architectures=["Qwen2ForCausalLM"])
        case True, False, True:
            return Qwen3Config(**common, rope_parameters=rope, architectures=["Qwen3ForCausalLM"])
    return MegakrauseConfig(
        **common,
        attention=model.attention_of_layers,
        krause_window=model.window,
        krause_top_k=model.top_k,
        krause_sigma=model.sigma,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        norm=model.norm,
        post_norm=model.norm_placement == "post",
        mlp=model.mlp,
        bias=model.bias,
        position_scaling=None if model.rope_scaling is None else model.rope_scaling.model_dump(),
        learned_positions=model.positions == "learned",
        rope_theta=model.rope_theta,
        architectures=["MegakrauseForCausalLM"],
        auto_map=AUTO_MAP,
        image_shape=list(model.image_shape) if model.kind == "image" else None,
    )


def _stretched(model: ModelConfig) -> dict[str, Any]:
    """How positions are stretched, in transformers' words."""
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    words: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        words |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        words |= {"original_max_position_embeddings": scaling.original_positions}
    return words


def _write_weights(source: Weights, folder: Path, dtype: torch.dtype) -> None:
    """One shard in memory at a time. A tied output projection is not stored: the config says it is tied."""
    sizes = {name: dtype.itemsize * math.prod(shape) for name, shape in source.shapes.items()}
    shards = _shards(sizes)
    files: dict[str, str] = {}
    with tqdm(total=sum(sizes.values()), desc="writing", unit="B", unit_scale=True) as progress:
        for i, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = {to_hf(name): source.weights(name).to(dtype) for name in names}
            write_bytes(folder, file, tensor_chunks(tensors, {"format": "pt"}))
            files |= {to_hf(name): file for name in names}
            progress.update(sum(sizes[name] for name in names))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Names in order, in groups of at most SHARD_SIZE bytes; a larger one is alone."""
    shards: list[list[str]] = [[]]
    room = SHARD_SIZE
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_SIZE
        shards[-1].append(name)
        room -= size
    return shards


def is_code_ours(folder: Path) -> bool:
    """Whether all the code that transformers would run for a folder is the modelling file that this version writes."""
    maps: dict[str, Any] = {}
    for path in folder.glob("*.json"):
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            return False
        if isinstance(content, dict) and "auto_map" in content:
            maps[path.name] = content["auto_map"]
    code = [path.name for path in folder.rglob("*.py")]
    if maps != {"config.json": AUTO_MAP} or code != [f"{MODELING}.py"]:
        return False
    return filecmp.cmp(folder / code[0], modeling_megakrause.__file__, shallow=False)


def has_code(folder: Path) -> bool:
    """Whether transformers would find code to run for a folder, in it or elsewhere."""
    return any(folder.rglob("*.py")) or any(b"auto_map" in path.read_bytes() for path in folder.glob("*config.json"))


def load_float64(folder: Path, *, trust_remote_code: bool) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust_remote_code, dtype=torch.float64
    )
    return model


@torch.no_grad()
def compare_logits(load: Callable[[], LanguageModel], reload: Callable[[], Any], path: str) -> float:
    """The largest absolute difference of the logits of our model, in float32, and another, in float64, on random tokens
    that reach beyond two windows. One after the other is in memory.

    In float64: the choice of the top_k keys is discontinuous, and where two keys are as near as float32 can tell, the
    same sums in another order keep another key. Our modelling file does our model's arithmetic, and may differ by less
    than the largest logit's last bit in float32. Llama and Qwen2 take norms in float32 and round the frequencies of
    rotation otherwise: they may differ by 4 times what that does to our own model. Raises UserError for more."""
    model = load()
    config = model.config
    length = max(64, 2 * (config.window or 0) + 2)
    if config.positions == "learned":
        length = min(length, config.num_positions or length)
    tokens = torch.randint(config.vocab_size or 0, (1, length), generator=torch.Generator().manual_seed(0))
    eps = torch.finfo(torch.float32).eps
    model.config = config.model_copy(update={"rope_theta": config.rope_theta * (1 + eps)})
    rounded: Tensor = model(tokens)
    model.config = config
    expected: Tensor = model.double()(tokens)
    del model
    reloaded = reload()
    difference = float((reloaded(tokens).logits - expected).abs().max())
    if reloaded.config.model_type == MegakrauseConfig.model_type:
        tolerance = eps * float(expected.abs().max())
    else:
        tolerance = 4 * float((rounded - expected).abs().max())
    if not difference <= tolerance:  # nor if it is NaN
        raise UserError(
            f"{path}: logits of the reloaded export differ by {difference:.1e}, more than the {tolerance:.1e} "
            "that rounding explains; nothing was written"
        )
    return difference

"""Writes the adapters of a checkpoint as a PEFT folder, which PeftModel.from_pretrained puts on the model that they
were trained on.

OUT/
    adapter_config.json  adapter_model.safetensors
    megakrause_export.json                          last: marks the folder as an export, complete and compared
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel

from megakrause.checkpoint.files import tensor_chunks, write_bytes
from megakrause.checkpoint.model import MergedWeights, check_same_model, check_shapes, stored_config
from megakrause.checkpoint.read import Checkpoint, find_checkpoint
from megakrause.config import LoraConfig
from megakrause.errors import UserError
from megakrause.hf.config import read_config
from megakrause.hf.export import compare_logits, has_code, is_code_ours, load_float64, staged
from megakrause.hf.names import to_hf
from megakrause.hf.weights import HuggingFaceWeights
from megakrause.models.build import build_language_model, whole_shapes
from megakrause.models.lm import LanguageModel
from megakrause.models.lora import adapter_names, merge

LAYERS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"} | {
    name: f"{name}_proj" for name in ("gate", "up", "down")
}


def export_adapter(checkpoint: str, base: Path, out: Path) -> float:
    """Writes OUT for the Hugging Face folder BASE, puts it on that with PEFT and compares the logits with our own
    model's. Returns the largest absolute difference.

    Raises UserError when the checkpoint has no adapters, when BASE is not what they were trained on, when OUT is there
    and no earlier export, or when the logits differ."""
    source = find_checkpoint(checkpoint)
    lora = stored_config(source).model.lora
    if lora is None:
        raise UserError(f"{source.path} has no adapters; its config has no [model.lora]")
    _check_base(source, base)
    with staged(out, source.step) as (folder, marker):
        tensors = {}
        for name in source.shapes:
            for key, adapter in zip("AB", adapter_names(name), strict=True):
                if adapter in source.shapes:
                    layer = to_hf(name).removesuffix(".weight")
                    tensors[f"base_model.model.{layer}.lora_{key}.weight"] = source.weights(adapter)
        write_bytes(folder, "adapter_model.safetensors", tensor_chunks(tensors, {"format": "pt"}))
        _peft_config(lora, base).save_pretrained(str(folder))
        marker["max_logit_difference"] = difference = _compare(source, lora, base, folder)
    return difference


def _check_base(source: Checkpoint, base: Path) -> None:
    """Frozen weights may have been rounded to 16 bits here, trained ones there."""
    if has_code(base) and not is_code_ours(base):
        raise UserError(f"{base} has code that is not this version's and is not run; write it anew with convert to-hf")
    model, _ = read_config(base)
    try:
        check_same_model(str(base), model, stored_config(source).model)
    except UserError as error:
        raise UserError(f"{base} is not the base of these adapters: {error}") from error
    frozen, theirs = MergedWeights(source, adapters=False), HuggingFaceWeights(base, model.tie_embeddings)
    try:
        check_shapes(theirs, whole_shapes(model))
        check_shapes(theirs, frozen.shapes)
    except UserError as error:
        hint = ""
        if any(".krause." in name for name in frozen.shapes):
            hint = "; of a model with Krause branches write one with `megakrause convert to-hf --without-adapters`"
        raise UserError(f"{base} is not the base of these adapters: {error}{hint}") from error
    for name in frozen.shapes:
        here, there = frozen.weights(name), theirs.weights(name)
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        if not any(torch.equal(here.to(dtype), there.to(dtype)) for dtype in dtypes):
            raise UserError(f"{base} is not the base of these adapters: {name} is another in {source.path}")


def _peft_config(lora: LoraConfig, base: Path) -> PeftConfig:
    modules = []
    for target in lora.targets:
        branch, _, layer = target.rpartition(".")
        prefix = {"": "", "attention": "self_attn.", "krause": "krause."}[branch]
        modules.append(prefix + LAYERS[layer])
    alpha: Any = lora.alpha  # PEFT's type is int; any number works
    return PeftConfig(
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilized,
        target_modules=modules,
        inference_mode=True,
    )


def _compare(source: Checkpoint, lora: LoraConfig, base: Path, folder: Path) -> float:
    config = stored_config(source).model.model_copy(update={"lora": None})

    @torch.no_grad()
    def ours() -> LanguageModel:
        theirs, model = HuggingFaceWeights(base, config.tie_embeddings), build_language_model(config)
        for name, param in model.named_parameters():
            weight, (a, b) = theirs.weights(name), adapter_names(name)
            if a in source.shapes:
                weight = merge(weight, source.weights(a), source.weights(b), lora.scale)
            param.copy_(weight)
        return model.eval()

    def reload() -> Any:
        plain = load_float64(base, trust_remote_code=is_code_ours(base))
        return PeftModel.from_pretrained(plain, folder).double().eval()

    return compare_logits(ours, reload, source.path)

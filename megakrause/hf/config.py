"""A Hugging Face folder's config as ours: Llama, Qwen1.5, Qwen2, Qwen3, and what this project has exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megakrause.config import ModelConfig
from megakrause.errors import UserError

TEXT = {"positions", "max_positions", "rope_theta", "rope_scaling", "qk_norm", "tie_embeddings", "vocab_size"}
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MegakrauseForCausalLM")


def read_config(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model that a folder holds, and its config.json. No code of the folder is ever run. Raises UserError."""
    path = Path(folder) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        architecture = (config.get("architectures") or ["none"])[0]
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {path}: {reason}") from error
    if architecture not in ARCHITECTURES:
        ours = ", ".join(name.removesuffix("ForCausalLM") for name in ARCHITECTURES)
        raise UserError(f"{path} is of architecture {architecture}, which cannot be read; these can: {ours}")
    try:
        tree = read_sizes(config, path)
        match architecture:
            case "LlamaForCausalLM":
                _refuse(config, path, attention_bias=False, mlp_bias=False)
            case "Qwen2ForCausalLM":
                tree |= {"qkv_bias": True} | _windows(config)
            case "Qwen3ForCausalLM":
                _refuse(config, path, attention_bias=False)
                tree |= {"qk_norm": True} | _windows(config)
            case _:
                tree |= _ours(config)
                if (shape := config.get("image_shape")) is not None:
                    tree = {key: value for key, value in tree.items() if key not in TEXT}
                    tree |= {"kind": "image", "image_size": shape[:2], "channels": shape[2]}
        return ModelConfig.model_validate(tree), config
    except KeyError as error:
        raise UserError(f"{path} lacks {error}") from error
    except (ValidationError, TypeError) as error:
        raise UserError(
            f"{path} describes no model that can be built: {str(error).splitlines()[-1].strip()}"
        ) from error


def read_sizes(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What all families' configs say in the same words, in ours. Raises UserError."""
    return _positions(config, path) | {
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "mlp_width": config["intermediate_size"],
        "attention": "softmax",
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "vocab_size": config["vocab_size"],
        "init_std": config.get("initializer_range", 0.02),
    }


def _positions(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Before transformers 5, rope_theta stood beside rope_scaling."""
    if config.get("learned_positions"):
        return {"positions": "learned", "max_positions": config["max_position_embeddings"]}
    rope = config.get("rope_parameters") or {}
    old = config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    scaling = rope or old
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    _refuse(config, path, hidden_act="silu", partial_rotary_factor=1.0)
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3"):
        raise UserError(f"{path} stretches positions by {kind!r}; only 'linear' and 'llama3' can be read")
    stretched = {"kind": kind, "factor": float(scaling["factor"])}
    if kind == "llama3":
        stretched |= {key: float(scaling[key]) for key in ("low_freq_factor", "high_freq_factor")}
        stretched |= {"original_positions": scaling["original_max_position_embeddings"]}
    return {"rope_theta": theta, "rope_scaling": stretched}


def _windows(config: dict[str, Any]) -> dict[str, Any]:
    """Sliding windows, which some layers of a Qwen may have."""
    if not config.get("use_sliding_window"):
        return {}
    layers, full = config["num_hidden_layers"], config.get("max_window_layers", 28)
    types = config.get("layer_types") or ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    kinds = ["softmax" if kind == "full_attention" else "softmax_window" for kind in types]
    return {"attention": kinds, "window": config["sliding_window"]}


def _ours(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention": config["attention"],
        "window": config["krause_window"],
        "top_k": config["krause_top_k"],
        "sigma": config["krause_sigma"],
        "qkv_bias": config["qkv_bias"],
        "qk_norm": config.get("qk_norm", False),
        "norm": config.get("norm", "rms"),
        "norm_placement": "post" if config.get("post_norm") else "pre",
        "mlp": config.get("mlp", "swiglu"),
        "bias": config.get("bias", False),
        "rope_scaling": config.get("position_scaling"),
    }


def _refuse(config: dict[str, Any], path: Path, **legal: Any) -> None:
    """Raises UserError for a value that this project's models do not have."""
    for key, value in legal.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"{path} has {key} = {config[key]!r}; only {value!r} can be read")

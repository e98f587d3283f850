"""The names of parameters, ours and Hugging Face's, both ways. Theirs are Llama's wherever it has the parameter."""

from __future__ import annotations

import re

from megakrause.errors import UserError

# Of the whole model.
_OUTER = {
    "embedding.tokens.weight": "model.embed_tokens.weight",
    "embedding.positions.weight": "model.embed_positions.weight",
    "head.norm.weight": "model.norm.weight",
    "head.norm.bias": "model.norm.bias",
    "head.output.weight": "lm_head.weight",
    "head.output.bias": "lm_head.bias",
}
# Of block N: ours stand behind `blocks.N.`, theirs behind `model.layers.N.`.
_INNER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention_norm.bias": "input_layernorm.bias",
    "attention.gate.weight": "self_attn.gate.weight",
    "attention.gate.bias": "self_attn.gate.bias",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.bias": "post_attention_layernorm.bias",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "mlp.gate.bias": "mlp.gate_proj.bias",
    "mlp.up.bias": "mlp.up_proj.bias",
    "mlp.down.bias": "mlp.down_proj.bias",
}
_ATTENTION = {
    "query.weight": "q_proj.weight",
    "query.bias": "q_proj.bias",
    "key.weight": "k_proj.weight",
    "key.bias": "k_proj.bias",
    "value.weight": "v_proj.weight",
    "value.bias": "v_proj.bias",
    "output.weight": "o_proj.weight",
    "output.bias": "o_proj.bias",
    "query_norm.weight": "q_norm.weight",
    "key_norm.weight": "k_norm.weight",
    "core.log_sigma": "log_sigma",
}
for _branch in ("", "krause."):
    _INNER |= {f"attention.{_branch}{ours}": f"self_attn.{_branch}{theirs}" for ours, theirs in _ATTENTION.items()}


def to_hf(name: str) -> str:
    """Hugging Face's name of a parameter of `LanguageModel`. Raises UserError for a name that has none."""
    return _translate(name, "blocks", "model.layers", _OUTER, _INNER)


def from_hf(name: str) -> str:
    """The name in `LanguageModel` of a parameter of Hugging Face's. Raises UserError for a name that has none."""
    outer, inner = ({theirs: ours for ours, theirs in table.items()} for table in (_OUTER, _INNER))
    return _translate(name, "model.layers", "blocks", outer, inner)


def _translate(name: str, prefix: str, new_prefix: str, outer: dict[str, str], inner: dict[str, str]) -> str:
    if name in outer:
        return outer[name]
    block = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
    if block is None or block[2] not in inner:
        raise UserError(f"parameter {name} has no counterpart; it is of another kind of model")
    return f"{new_prefix}.{block[1]}.{inner[block[2]]}"

"""Adapters: the same gradients and the same training as PEFT's, and merging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from megakrause.config import LoraConfig, ModelConfig
from megakrause.hf.names import to_hf
from megakrause.models.build import build_model, count_parameters, trained_shapes, whole_shapes
from megakrause.models.lm import LanguageModel
from megakrause.models.lora import adapter_names

ALL = ["query", "key", "value", "output", "gate", "up", "down"]
THEIRS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
SMALL: dict[str, Any] = dict(layers=2, width=32, heads=4, kv_heads=2, mlp_width=56, vocab_size=97, attention="softmax")


def make_pair(family: str, targets: int, **lora: Any) -> tuple[LanguageModel, Any]:
    """Ours and PEFT's, with the same weights and adapters, in float64."""
    torch.manual_seed(1)
    config = ModelConfig(**SMALL, qkv_bias=family == "qwen2", lora=LoraConfig(**lora, targets=ALL[:targets]))
    ours = build_model(config, seed=3).double()
    kind = Qwen2Config if family == "qwen2" else LlamaConfig
    base = AutoModelForCausalLM.from_config(
        kind(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
        )
    ).double()
    rank, alpha = lora["rank"], lora["alpha"]
    stabilized = lora.get("rank_stabilized", False)
    settings = PeftConfig(r=rank, lora_alpha=alpha, use_rslora=stabilized, target_modules=THEIRS[:targets])
    theirs = get_peft_model(base, settings)
    params = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, param in ours.named_parameters():
            params[their_name(name, params)].copy_(param)
    return ours, theirs


def their_name(name: str, params: dict[str, Any]) -> str:
    if ".adapter." in name:
        layer, which = name.split(".adapter.")
        return (
            f"base_model.model.{to_hf(layer + '.weight').removesuffix('.weight')}.lora_{which.upper()}.default.weight"
        )
    plain = f"base_model.model.{to_hf(name)}"
    head, _, last = plain.rpartition(".")
    return plain if plain in params else f"{head}.base_layer.{last}"


def loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("targets", "lora"), [(4, dict(rank=4, alpha=8.0)), (7, dict(rank=3, alpha=5.0, rank_stabilized=True))], ids=str
)
def test_gradients_and_three_steps_are_those_of_peft(family: str, targets: int, lora: dict[str, Any]) -> None:
    ours, theirs = make_pair(family, targets, **lora)
    frozen = {name: param.clone() for name, param in ours.named_parameters() if not param.requires_grad}
    trained = [(name, param) for name, param in ours.named_parameters() if param.requires_grad]
    assert {name for name, _ in trained} == trained_shapes(ours.config).keys()
    peft = {name: param for name, param in theirs.named_parameters() if param.requires_grad}
    names = {name: their_name(name, dict(theirs.named_parameters())) for name, _ in trained}
    assert set(names.values()) == peft.keys() and len(peft) == 2 * 2 * targets

    optimizers = [
        torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01) for params in ([p for _, p in trained], peft.values())
    ]
    for step in range(3):
        tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(step))
        losses = [loss(model, tokens) for model in (ours, theirs)]
        # Their norms, and the frequencies of rotation, are in float32.
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        for optimizer, value in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            value.backward()
        for name, param in trained:
            mine, other = param.grad, peft[names[name]].grad
            assert mine is not None and other is not None
            assert (mine - other).norm() <= 1e-5 * other.norm(), (step, name)
        for optimizer in optimizers:
            optimizer.step()
    for name, param in trained:
        assert (param - peft[names[name]]).norm() <= 1e-4 * param.norm(), name  # Adam divides by small gradients
    now = dict(ours.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())


def test_new_adapters_are_as_wide_as_those_of_peft_and_change_nothing() -> None:
    config = ModelConfig(**SMALL | {"width": 256, "mlp_width": 512})
    plain = build_model(config, seed=0)
    adapted = build_model(config.model_copy(update={"lora": LoraConfig(rank=64, alpha=1.0, targets=ALL)}), seed=0)
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(tokens), adapted(tokens))
    for name, param in adapted.named_parameters():
        if name.endswith("adapter.a"):
            reference = torch.nn.Linear(param.shape[1], 64, bias=False)
            torch.nn.init.kaiming_uniform_(reference.weight, a=5**0.5)  # PEFT
            assert float(param.detach().std()) == pytest.approx(float(reference.weight.detach().std()), rel=0.05)
            assert abs(float(param.detach().mean())) < 0.05 * float(param.detach().std())


def test_what_is_trained_beside_adapters() -> None:
    lora = LoraConfig(rank=2, alpha=4.0, targets=["krause.query", "attention.output", "gate"])
    config = ModelConfig(**SMALL | {"attention": ["dual", "krause"], "window": 8, "lora": lora})
    names = set(trained_shapes(config))
    adapted = {f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attention.output", "mlp.gate")}
    adapted.add("blocks.0.attention.krause.query")
    expected = {f"{layer}.adapter.{part}" for layer in adapted for part in "ab"}
    expected |= {"blocks.0.attention.krause.core.log_sigma", "blocks.1.attention.core.log_sigma"}
    expected |= {"blocks.0.attention.gate.weight", "blocks.0.attention.gate.bias"}
    assert names == expected
    model = build_model(config, seed=0)
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    assert count_parameters(model, trained=True) == sum(sizes[name] for name in names)
    assert whole_shapes(config).keys() == sizes.keys()


@torch.no_grad()
def test_merged_weights_are_the_adapted_layer() -> None:
    config = ModelConfig(**SMALL, lora=LoraConfig(rank=4, alpha=6.0, targets=ALL))
    model = build_model(config, seed=0).double()
    for name, param in model.named_parameters():
        if name.endswith("adapter.b"):
            param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    plain = build_model(config.model_copy(update={"lora": None}), seed=0).double()
    params = dict(model.named_parameters())
    for name, param in plain.named_parameters():
        if adapter_names(name)[0] in params:
            a, b = (params[each] for each in adapter_names(name))
            param.addmm_(b, a, alpha=config.lora.scale if config.lora else 0.0)
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=1e-11, atol=1e-11)
    assert (model(tokens) - build_model(plain.config, seed=0).double()(tokens)).abs().max() > 0.01

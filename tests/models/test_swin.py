"""The shifted-window transformer, and its attention against the published implementation's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from megakrause.config import ModelConfig
from megakrause.config.file import load_config
from megakrause.models.build import build_model, count_parameters
from megakrause.models.flops import image_flops
from megakrause.models.swin import ShiftedWindowAttention, SwinTransformer
from tests.ops.test_golden import TOLERANCE, read

SMALL: dict[str, Any] = dict(
    kind="swin", image_size=[32, 16], channels=3, patch_size=2, classes=5, layers=4, depths=[2, 2], width=12, heads=3,
    mlp_width=24, window=4, init_std=0.3,
)  # fmt: skip


@pytest.mark.parametrize("name", ["swin_attention", "swin_attention_shifted"])
def test_golden_attention(name: str) -> None:
    tensors, hyper = read(name)
    param = {key.removeprefix("param."): t for key, t in tensors.items() if key.startswith("param.")}
    x, width = tensors["input"].requires_grad_(), tensors["input"].shape[-1]
    layer = ShiftedWindowAttention(
        width, int(hyper["heads"]), int(hyper["window"]), int(hyper["shift"]), "krause", 1, 1
    )
    ours = {"proj.weight": layer.output.weight, "proj.bias": layer.output.bias}
    ours |= {"log_sigma": layer.log_sigma, "relative_position_bias_table": layer.bias_table}  # type: ignore[dict-item]
    parts = (layer.query, layer.key, layer.value)
    with torch.no_grad():
        for key, weight in ours.items():
            weight.copy_(param[key])
        for i, part in enumerate(parts):
            part.weight.copy_(param["qkv.weight"].chunk(3)[i])
            part.bias.copy_(param["qkv.bias"].chunk(3)[i])
    out = layer(x)
    out.backward(tensors["output_grad"])
    found = {"output": out, "input_grad": x.grad} | {f"grad.{key}": weight.grad for key, weight in ours.items()}
    found["grad.qkv.weight"] = torch.cat([part.weight.grad for part in parts])  # type: ignore[misc]
    found["grad.qkv.bias"] = torch.cat([part.bias.grad for part in parts])  # type: ignore[misc]
    assert {key for key in tensors if key.startswith("grad.")} <= found.keys()
    for key, value in found.items():
        assert value is not None
        assert (value - tensors[key]).norm() <= TOLERANCE * tensors[key].norm(), key


def test_swin_tiny_has_the_size_that_it_has_elsewhere() -> None:
    """Of torchvision's swin_t: 28,288,354 parameters, and here a width of the kernel for each head beside them."""
    config = load_config(Path(__file__).parents[2] / "configs" / "vit" / "kswin-t-imagenet.toml").model
    with torch.device("meta"):
        model = build_model(config)
    heads = sum(depth * (3 << stage) for stage, depth in enumerate([2, 2, 6, 2]))
    assert count_parameters(model) == 28_288_354 + heads
    assert 2 * 4.3e9 < image_flops(config).needed < 2 * 4.6e9  # 4.5 G multiplications and additions


@pytest.mark.parametrize("attention", ["krause", "softmax"])
def test_operations_are_those_of_its_products(attention: str) -> None:
    model = build_model(ModelConfig(**(SMALL | {"attention": attention})), seed=0)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 16))
    assert image_flops(model.config).executed == counter.get_total_flops()


def test_a_patch_sees_its_window_and_across_it_where_that_is_shifted() -> None:
    generator = torch.Generator().manual_seed(0)
    for shift in (0, 2):
        layer = ShiftedWindowAttention(6, 2, 4, shift, "krause", 1.0, 1.0).double()
        with torch.no_grad():
            for param in layer.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        x = torch.randn(1, 8, 8, 6, generator=generator, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x)[0, 3, 3].sum(), x)
        reached = (gradient.abs().sum(-1)[0] > 0).nonzero()
        first, last = reached.min(0).values.tolist(), reached.max(0).values.tolist()
        assert (first, last) == (([0, 0], [3, 3]) if shift == 0 else ([2, 2], [5, 5])) and len(reached) == 16
        (gradient,) = torch.autograd.grad(layer(x)[0, 0, 0].sum(), x)
        assert len((gradient.abs().sum(-1)[0] > 0).nonzero()) == (16 if shift == 0 else 4)  # not around the edge


def test_whole_images_are_left_out_of_blocks_by_their_seeds() -> None:
    model = build_model(ModelConfig(**(SMALL | {"drop_path": 0.5})), seed=0).double()
    assert isinstance(model, SwinTransformer)
    x = torch.randn(4, 3, 32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([1, 2, 3, 4])
    first = model(x, seeds=seeds)
    assert torch.equal(first, model(x, seeds=seeds)) and not torch.equal(first, model(x))
    torch.testing.assert_close(model(x[2:], seeds=seeds[2:]), first[2:])
    model.eval()
    assert torch.equal(model(x, seeds=seeds), model(x))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(depths=[2, 1]), r"model.depths = \[2, 1\] are 3 blocks, model.layers = 4"),
        (dict(window=3), "model.window = 3 does not divide a stage's 16 x 8 patches"),
        (dict(norm="rms"), "model.norm = 'rms': a swin knows no other than 'layer'"),
        (dict(top_k=3), "model.top_k = 3: a swin knows no other than None"),
        (dict(depths=[1] * 4 + [0]), "depths"),
        (dict(depths=None), "model.depths is missing; a model of kind swin needs one"),
    ],
)
def test_a_config_that_is_none_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelConfig(**(SMALL | changes))

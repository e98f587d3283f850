"""The vision transformer, what is said of its size, and images drawn value by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megakrause import Grid
from megakrause.analyze.attention_maps import attention_weights
from megakrause.config import ModelConfig
from megakrause.models.build import build_language_model, build_model
from megakrause.models.flops import flops_of_layers, image_flops, neighbourhood_sizes
from megakrause.models.objective import class_sums
from megakrause.models.pictures import draw, grid, upper_half
from megakrause.models.sample import cached_step
from megakrause.models.vit import VisionTransformer

BASE: dict[str, Any] = dict(
    kind="vit", image_size=12, channels=3, patch_size=3, classes=7, layers=3, width=16, heads=4, mlp_width=24,
    top_k=2, top_k_last=5, init_std=0.3,
)  # fmt: skip


def make_model(**changes: Any) -> VisionTransformer:
    model = build_model(ModelConfig(**(BASE | changes)), seed=1).double().eval()
    assert isinstance(model, VisionTransformer)
    return model


def images(b: int = 2) -> Tensor:
    return torch.randn(b, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_top_k_grows_evenly_over_the_layers() -> None:
    assert ModelConfig(**(BASE | {"layers": 12, "top_k": 8, "top_k_last": 16})).top_k_of_layers == [
        round(float(k)) for k in np.linspace(8, 16, 12)
    ]
    assert ModelConfig(**(BASE | {"layers": 1})).top_k_of_layers == [2]
    assert ModelConfig(**(BASE | {"top_k_last": None})).top_k_of_layers == [2, 2, 2]


def test_a_class_is_read_from_its_token_or_from_the_mean() -> None:
    for pooling, length in (("cls", 17), ("mean", 16)):
        model = make_model(pooling=pooling)
        assert model.config.length == length and model(images()).shape == (2, 7)


def test_a_patch_reaches_as_far_as_its_neighbours_layer_by_layer() -> None:
    """Without a token that sees all: a corner's influence is exactly zero beyond the radius times the layers."""
    model = make_model(pooling="mean", layers=2, top_k=None, top_k_last=None)
    found: list[Tensor] = []
    model.layers[-1].register_forward_hook(lambda module, given, out: found.append(out))
    x = images(1).requires_grad_()
    model(x)
    (gradient,) = torch.autograd.grad(found[0][0, 0].sum(), x)  # of the patch in the corner
    reached = gradient.abs().sum((0, 1)).view(4, 3, 4, 3).sum((1, 3)) > 0
    row, column = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    assert torch.equal(reached, row + column <= 2)


@pytest.mark.parametrize("metric", ["manhattan", "chebyshev"])
@pytest.mark.parametrize("radius", [0, 1, 2, 9])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_neighbourhoods_are_counted_as_they_are(metric: Any, radius: int, pooling: str) -> None:
    config = ModelConfig(**(BASE | dict(metric=metric, radius=radius, pooling=pooling, image_size=[12, 15])))
    mask = Grid(4, 5, radius, metric, pooling == "cls").mask()
    assert neighbourhood_sizes(config) == mask.sum(1).tolist()


def test_operations_of_an_image_are_those_of_its_products() -> None:
    """Against torch's own counter, of the dense products that are executed."""
    from torch.utils.flop_counter import FlopCounterMode

    for attention in ("krause", "softmax"):
        model = make_model(attention=attention)
        # The fused attention of CPUs is unknown to the counter.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(images(1))
        flops = image_flops(model.config)
        assert flops.executed == counter.get_total_flops()
        assert flops.needed == flops.executed if attention == "softmax" else flops.needed < flops.executed


def test_operations_of_an_image_model_are_those_of_its_values() -> None:
    config = ModelConfig(kind="image", image_size=[4, 5], layers=2, width=8, heads=2, mlp_width=12, attention="softmax")
    assert 3 * image_flops(config).needed == pytest.approx(config.length * sum(flops_of_layers(config, config.length)))


def test_what_is_learnt_and_counted() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([int(logits[0].argmax()), int(logits[1].argsort()[-5]), int(logits[2].argsort()[-6]), 1, 2])
    mask = torch.tensor([True, True, True, False, False])
    nats, top1, top5 = class_sums(logits, F.one_hot(labels, 9).double(), mask)
    assert float(nats) == pytest.approx(float(F.cross_entropy(logits[:3], labels[:3], reduction="sum")))
    assert (int(top1), int(top5)) == (1, 2)


def test_attention_maps_are_what_the_layers_compute() -> None:
    for attention in ("krause", "softmax"):
        model = make_model(attention=attention)
        weights = attention_weights(model, images())
        assert [w.shape for w in weights] == 3 * [(2, 4, 17, 17)]
        for layer, (w, kept) in enumerate(zip(weights, [2, 4, 5], strict=True)):
            torch.testing.assert_close(w.sum(-1), torch.ones(2, 4, 17).double())
            if attention == "krause":
                assert int((w > 0).sum(-1).max()) <= kept, layer
    # The output of a layer's core is what the weights make of the values.
    model, found = make_model(), []
    hook = model.layers[1].attention.core.register_forward_hook(lambda core, given, out: found.append((given[2], out)))
    weights = attention_weights(model, images())
    hook.remove()
    values, out = found[0]
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", weights[1], values), out)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(window=4), "model.window is a key of model.kind = lm or image or swin, not of vit"),
        (dict(vocab_size=4), "model.vocab_size is a key of model.kind = lm, not of vit"),
        (dict(patch_size=5), r"model.patch_size = 5 does not divide model.image_size = 12; use one of \[1, 2, 3, 4"),
        (dict(classes=None), "model.classes is missing; a model of kind vit needs one"),
        (dict(attention="dual"), "model.attention = 'dual' is none of kind vit"),
        (dict(kind="image"), "is a key of model.kind = vit or swin, not of image"),
        (dict(image_size=0), "model.image_size = 0 must be at least 1"),
    ],
)
def test_a_config_that_is_none_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelConfig(**(BASE | changes))


def test_only_the_keys_of_a_kind_are_written() -> None:
    vit, lm = ModelConfig(**BASE), ModelConfig(layers=1, width=8, heads=2, mlp_width=8, window=4)
    assert ModelConfig(**vit.model_dump()) == vit and ModelConfig(**lm.model_dump()) == lm
    assert "rope_theta" not in vit.model_dump() and "patch_size" not in lm.model_dump()
    assert (vit.norm, vit.mlp, vit.bias, vit.qkv_bias) == ("layer", "gelu", True, True)


# ---- images, value by value

IMAGE: dict[str, Any] = dict(
    kind="image", image_size=[4, 3], channels=3, layers=2, width=16, heads=4, mlp_width=24, window=7, top_k=4,
    init_std=0.3,
)  # fmt: skip


@pytest.mark.parametrize("attention", ["krause", "softmax"])
def test_images_drawn_with_a_cache_are_those_without(attention: str) -> None:
    config = ModelConfig(**(IMAGE | {"attention": attention}))
    model = build_language_model(config, seed=2).double().eval()
    known = torch.randint(256, (5, 7), generator=torch.Generator().manual_seed(0))
    so_far: list[Tensor] = []

    def whole(tokens: Tensor) -> Tensor:
        so_far.append(tokens)
        return model(torch.cat(so_far, 1))

    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (0.7, 0.4)):
        so_far.clear()
        options: dict[str, Any] = dict(temperature=temperature, top_p=top_p, seed=3)
        drawn = draw(cached_step(model), config, known, **options)
        assert drawn.shape == (5, 4, 3, 3) and drawn.dtype == np.uint8
        assert np.array_equal(drawn, draw(whole, config, known, **options))
        assert np.array_equal(drawn.reshape(5, -1)[:, :7], known.numpy())


def test_the_cache_of_a_krause_model_does_not_grow() -> None:
    model = build_language_model(ModelConfig(**IMAGE), seed=2).eval()
    cache = model.new_cache()
    for _ in range(30):
        model(torch.zeros(2, 1, dtype=torch.int64), cache=cache)
    assert all(layer.ring(torch.zeros(2, 1, 4, 4)).k.shape[1] == 7 for layer in cache.layers)


def test_the_upper_half_and_a_grid() -> None:
    pictures = np.arange(3 * 4 * 2 * 1, dtype=np.uint8).reshape(3, 4, 2, 1)
    assert np.array_equal(upper_half(pictures).numpy(), pictures[:, :2].reshape(3, 4))
    whole = grid(pictures, columns=2, scale=3)
    assert whole.shape == (27, 15, 1)
    assert np.array_equal(whole[:12:3, :6:3], pictures[0]) and np.array_equal(whole[15::3, :6:3], pictures[2])
    assert (whole[12:15] == 128).all() and (whole[15:, 9:] == 128).all()

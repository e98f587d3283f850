"""The vision transformer cut over tensor-parallel ranks and into pipeline stages: the objective and every parameter's
gradient are those of one process, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megakrause.config import ModelConfig
from megakrause.models.init import initialize, whole_names
from megakrause.models.layout import Layout, Recompute
from megakrause.models.objective import class_sums
from megakrause.models.vit import VisionTransformer
from megakrause.parallel.linear import TensorParallel
from megakrause.parallel.mesh import Axis, Mesh
from tests.ops.cases import pairwise
from tests.parallel.test_model import SEEDS, name_of, whole
from tests.pool import Pool

SETTINGS: dict[str, list[Any]] = {
    "tp": [1, 2, 4],
    "sequence_parallel": [False, True],
    "recompute": ["none", "selective", "full"],
    "attention": ["krause", "softmax", "krause+softmax"],
    "pooling": ["cls", "mean"],
    "norm_placement": ["pre", "post"],
    "shared_sigma": [False, True],
    "drop_path": [0.0, 0.4],
    "dropout": [0.0, 0.2],
    "classes": [8, 11],
}


def model_config(attention: str = "krause", **changes: Any) -> ModelConfig:
    kinds = attention.split("+")
    given: dict[str, Any] = dict(layers=2, width=24, heads=8, mlp_width=30, init_std=0.3, top_k=2, top_k_last=4)
    given |= dict(image_size=[8, 12], channels=1, patch_size=2, classes=11, metric="chebyshev", sigma=1.5)
    return ModelConfig(kind="vit", attention=kinds * (2 // len(kinds)), **(given | changes))


def batch(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 1, 8, 12, generator=generator, dtype=torch.float64)
    return images, torch.rand(2, classes, generator=generator).double().softmax(-1), torch.tensor([True, True])


def make_model(config: ModelConfig, layout: Layout | None = None) -> VisionTransformer:
    model = VisionTransformer(config, layout)
    initialize(model, 0)
    return model.double()


def gradients(mesh: Mesh, config: ModelConfig, sequence_parallel: bool, recompute: Recompute) -> Any:
    model = make_model(config, Layout(TensorParallel(mesh.tp, sequence_parallel), recompute=recompute))
    assert config.classes is not None
    images, targets, mask = batch(config.classes)
    sums = class_sums(model(images, seeds=SEEDS), targets, mask)
    sums[0].backward()
    return sums.detach(), {n: (p.detach(), p.grad, getattr(p, "shard", None)) for n, p in model.named_parameters()}


@pytest.mark.parametrize("case", [pytest.param(c, id=name_of(c)) for c in pairwise(SETTINGS)])
def test_the_objective_and_every_gradient_equal_one_process(pool: Pool, case: dict[str, Any]) -> None:
    tp, parallel, recompute = (case.pop(key) for key in ("tp", "sequence_parallel", "recompute"))
    config = model_config(**case)
    model = make_model(config)
    assert config.classes is not None
    images, targets, mask = batch(config.classes)
    logits = model(images, seeds=SEEDS)
    assert ((logits - model(images)).abs().max() > 0.01) == config.has_dropout
    expected = class_sums(logits, targets, mask)
    expected[0].backward()
    results = pool.run_mesh((1, 1, 1, tp), gradients, config, parallel, recompute)
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for sums, _ in results:
        torch.testing.assert_close(sums, expected.detach(), rtol=1e-13, atol=0)
    for name, param in model.named_parameters():
        values, grads, shards = zip(*(found[name] for _, found in results), strict=True)
        assert torch.equal(whole(values, shards, name), param), f"initial {name}"
        assert param.grad is not None and param.grad.abs().max() > 0
        bound = 1e-12 * max(float(param.grad.abs().max()), largest / 100)
        torch.testing.assert_close(whole(grads, shards, name), param.grad, rtol=0, atol=bound, msg=name)


def test_pipeline_stages_one_after_the_other_are_the_model() -> None:
    config = model_config(layers=2)
    images, targets, mask = batch(11)
    model = make_model(config)
    expected = class_sums(model(images, seeds=SEEDS), targets, mask)[0]
    expected.backward()
    stages = tuple(range(i, i + 1) for i in range(2))
    parts = [make_model(config, Layout(pp=Axis(i, 2, None), stages=stages)) for i in range(2)]
    x = images
    for part in parts:
        x = part(x, length=config.length, seeds=SEEDS)
    loss = class_sums(x, targets, mask)[0]
    loss.backward()
    assert torch.equal(loss, expected)
    found = {name: param for part in parts for name, param in whole_names(part).items()}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name].grad, param.grad, rtol=1e-12, atol=1e-14, msg=name)

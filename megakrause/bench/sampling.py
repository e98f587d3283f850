"""`megakrause bench sampling`: images a second that an image model draws, with Krause attention and a cache of its
window, and its softmax twin with a cache of all values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megakrause.bench.measure import machine, ratio, take_turns, write_json
from megakrause.config import ModelConfig
from megakrause.errors import UserError
from megakrause.models.attention import GrowingCache, WindowCache
from megakrause.models.build import build_language_model
from megakrause.models.lm import LanguageModel, ModelCache
from megakrause.models.pictures import draw
from megakrause.models.sample import cached_step
from megakrause.table import table

# As configs/image/{krause,softmax}-cifar10.toml.
MODEL: dict[str, Any] = dict(kind="image", image_size=32, layers=16, width=512, heads=8, mlp_width=2048)
KINDS: dict[str, dict[str, Any]] = {"krause": dict(window=256, top_k=192), "softmax": {}}
QUARTERS, TIMED = 4, 5  # of the values of an image; steps timed in each
ROUNDS = 3


def run(batches: list[int], json_path: Path | None) -> None:
    """Checks, times, prints the table and writes it as JSON. Raises UserError when the check fails."""
    total = math.prod(ModelConfig(**MODEL, attention="softmax").image_shape)
    print(f"images of {total} values, {MODEL['layers']} layers of width {MODEL['width']}; {machine()}")
    for kind in KINDS:
        check(kind)
    models = {kind: make_model(kind) for kind in KINDS}
    rows = []
    for batch in batches:
        rows += measure(models, batch, total)
    print(table(rows))
    print(
        f"seconds: of all steps of a batch, from {TIMED} in each quarter of the values, medians of {ROUNDS} turns; "
        "softmax / krause: of the sums"
    )
    if json_path is not None:
        write_json(json_path, {"machine": machine(), "model": MODEL, "rows": rows})


def make_model(kind: str, **changes: Any) -> LanguageModel:
    config = ModelConfig(**(MODEL | KINDS[kind] | {"attention": kind} | changes))
    return build_language_model(config, seed=0).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def check(kind: str) -> None:
    """Images that are drawn with the cache are those that are drawn without: of a model of four layers, in float64."""
    model = make_model(kind, image_size=[6, 20], layers=4, **({"window": 32, "top_k": 24} if kind == "krause" else {}))
    model.double()
    known = torch.full((2, 1), 7, device=next(model.parameters()).device)
    before: list[torch.Tensor] = []

    def whole(tokens: torch.Tensor) -> torch.Tensor:
        before.append(tokens)
        return model(torch.cat(before, dim=1))

    if not np.array_equal(draw(cached_step(model), model.config, known), draw(whole, model.config, known)):
        raise UserError(f"{kind}: images drawn with a cache differ from those without; nothing was timed")


def measure(models: dict[str, LanguageModel], batch: int, total: int) -> list[dict[str, Any]]:
    """Rows: a quarter of the values each, and all of them."""
    caches = {kind: full_cache(model, batch, total) for kind, model in models.items()}
    quarter, rows = total // QUARTERS, []
    sums = {kind: np.zeros(ROUNDS) for kind in models}
    progress = tqdm(total=QUARTERS * TIMED, desc=f"batch {batch}", unit="position", leave=False)
    for number in range(QUARTERS):
        of_quarter = {kind: np.zeros(ROUNDS) for kind in models}
        for place in range(TIMED):
            position = number * quarter + (2 * place + 1) * quarter // (2 * TIMED)  # the middles of five parts
            steps: dict[str, Callable[[], Any]] = {
                kind: partial(_step, models[kind], caches[kind], batch, position) for kind in models
            }
            for kind, seconds in take_turns(steps, rounds=ROUNDS).items():
                of_quarter[kind] += np.array(seconds) * quarter / TIMED
            progress.update()
        rows.append(_row(batch, f"{number * quarter} to {(number + 1) * quarter - 1}", of_quarter))
        for kind in models:
            sums[kind] += of_quarter[kind]
    progress.close()
    return [*rows, _row(batch, "all", sums)]


def _row(batch: int, values: str, seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    median = {kind: statistics.median(times.tolist()) for kind, times in seconds.items()}
    row: dict[str, Any] = {"batch": batch, "values": values}
    row |= {f"{kind} s": value for kind, value in median.items()}
    rates = {f"{kind} images/s": batch / value for kind, value in median.items()} if values == "all" else {}
    row |= {f"{kind} images/s": rates.get(f"{kind} images/s") for kind in seconds}
    return row | {"softmax / krause": ratio(seconds["softmax"].tolist(), seconds["krause"].tolist())}


def full_cache(model: LanguageModel, batch: int, total: int) -> ModelCache:
    """A cache as it is after all values, which are random numbers, the same for each sequence."""
    cache, config = model.new_cache(total), model.config
    weight = next(model.parameters())
    for layer in cache.layers:
        length = config.window if isinstance(layer, WindowCache) else total - 1
        assert length is not None
        shape = (2, 1, length, config.num_kv_heads, config.head_size)
        k, v = torch.randn(shape, dtype=weight.dtype, device=weight.device).expand(-1, batch, -1, -1, -1)
        if isinstance(layer, GrowingCache):
            layer.extend(k, v, 0)
        elif isinstance(layer, WindowCache):
            layer.ring(k).fill(k, v, total - 1 - length)
    return cache


@torch.no_grad()
def _step(model: LanguageModel, cache: ModelCache, batch: int, position: int) -> None:
    """What one more value costs, its choice included."""
    cache.position = position
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=next(model.parameters()).device)
    p = model(tokens, cache=cache)[:, -1].float().softmax(-1)
    torch.multinomial(p, 1)

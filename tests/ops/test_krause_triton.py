"""The Triton backend against the float64 reference, output and every gradient; without a GPU in Triton's interpreter.

float32 and float16 are checked there, bfloat16, which the interpreter multiplies as integers, on a GPU alone.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakrause import Grid, krause_attention
from megakrause.ops import krause_backward, krause_forward
from megakrause.ops.krause_launch import Launch
from megakrause.ops.krause_reference import visible
from megakrause.ops.softmax import _by_kernel, causal_mask
from tests.ops.cases import DEVICE, HALF, Case, error, inputs, on_grid, pairwise, run

# The interpreter's numpy warns of inf - inf and the like on rows that see nothing; their results are not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SETTINGS: dict[str, list[Any]] = {
    "s": [1, 2, 63, 64, 65, 111, 200],
    "window": [1, 2, 16, 17, 33, 64, 100, 128, 160, 300],
    "top_k": ["none", "1", "3", "W-1", "W", "W+1"],
    "heads": [(1, 1), (2, 2), (4, 2), (3, 1), (4, 1), (6, 1), (8, 1)],
    "halo": ["none", "W-1", "less", "more"],
    "documents": ["none", "short", "long", "empty rows"],
    "sigmas": ["one a head", "one"],
    "dropout": [0.0, 0.3],
    "d": [16, 24, 32, 64, 96, 128],
}
WIDE = [
    Case(40, 512, "3", (2, 1), "W-1", "none", "one", 0.0, 32),
    Case(50, 1024, "W-1", (1, 1), "less", "long", "one", 0.2, 64),
    Case(30, 700, "3", (4, 1), "more", "none", "one", 0.0, 16),
    Case(20, 1000, "none", (1, 1), "W-1", "none", "one", 0.0, 128),
]


def slow_unless(quick: bool) -> Any:
    return () if quick else pytest.mark.slow


# All of `make test-full`: three selections in which all pairs meet. `make test` runs one case in twenty of them.
CASES = [Case(**settings) for seed in range(3) for settings in pairwise(SETTINGS, seed)] + WIDE
CASE_PARAMETERS = [pytest.param(case, id=str(case), marks=slow_unless(i % 20 == 0)) for i, case in enumerate(CASES)]


def sdpa_error(tensors: tuple[Tensor, ...], dtype: torch.dtype, options: dict[str, Any]) -> float:
    """The largest relative error of torch's own attention, output or gradient, on the same q, k, v, window and
    documents in this dtype: what the best of torch loses there."""
    q, k, v = (t.double() for t in tensors[:3])
    s, s_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    mask = causal_mask(s, s_k, options.get("doc_start"), q.device, options.get("window") or s_k)
    if options.get("grid") is not None:
        mask = options["grid"].mask()
    if mask is not None:
        mask = mask | ~mask.any(-1, keepdim=True)  # rows that see nothing are NaN there

    def results(compute: torch.dtype) -> list[Tensor]:
        leaves = [t.to(compute).requires_grad_() for t in (q, k, v)]
        wide = [leaves[0], *(t.repeat_interleave(group, dim=2) for t in leaves[1:])]
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in wide), attn_mask=mask).transpose(1, 2)
        upstream = on_grid(*out.shape, generator=torch.Generator().manual_seed(7), dtype=compute)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    exact, rounded = results(torch.float64), results(dtype)
    terms = exact[0].numel()
    return max(error(a, e, terms) for a, e in zip(rounded, exact, strict=True))


def assert_as_exact_as_torch(tensors: tuple[Tensor, ...], dtype: torch.dtype, **options: Any) -> None:
    """In float32 at most twice the error of the float32 reference, and what rounding leaves of D_i - dO_i . v_j where
    these cancel: sums of d products of about 1. In 16 bits at most four times the error of torch's own attention: the
    weights of fewer keys are larger, and so are their roundings, and dk is the difference of two sums."""
    exact = run(tensors, backend="reference", **options)
    actual = run(tensors, dtype, backend="triton", **options)
    terms = exact["out"].numel()
    if dtype == torch.float32:
        baseline = run(tensors, dtype, backend="reference", **options)
        cancelled = 2 * tensors[0].shape[-1] ** 0.5 * torch.finfo(dtype).eps
        allowed = {name: 2 * error(baseline[name], value, terms) + cancelled for name, value in exact.items()}
    else:
        loss = 4 * sdpa_error(tensors, dtype, options) + torch.finfo(dtype).eps
        if options["dropout"] > 0:  # the result is rounded even where it is one value, and D_i with it
            loss += tensors[0].shape[-1] ** 0.5 * torch.finfo(dtype).eps / 2
        allowed = dict.fromkeys(exact, loss)
    for name, value in exact.items():
        assert error(actual[name], value, terms) <= allowed[name], name


# ---- against the reference


@pytest.mark.parametrize("case", CASE_PARAMETERS)
def test_it_equals_the_reference(case: Case) -> None:
    # Both get the same log_sigma: one that float32 holds.
    assert_as_exact_as_torch(case.tensors(), torch.float32, **case.options())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=slow_unless(i % 24 == 3)) for i, c in enumerate(CASES) if i % 3 == 0]
)
def test_it_equals_the_reference_in_16_bits(case: Case, dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(case.tensors(), dtype, **case.options())


GRIDS = [
    (Grid(height, width, radius, metric, cls), top_k, dropout)
    for height, width in [(1, 1), (3, 5), (8, 8), (10, 13), (14, 14)]
    for radius, metric, cls, top_k, dropout in [
        (0, "manhattan", True, 1, 0.0),
        (1, "manhattan", True, 3, 0.0),
        (1, "chebyshev", False, 4, 0.2),
        (2, "manhattan", False, None, 0.0),
        (2, "chebyshev", True, 8, 0.2),
        (3, "manhattan", True, None, 0.2),
        (3, "chebyshev", True, 500, 0.0),
    ]
]


@pytest.mark.parametrize(
    "grid, top_k, dropout",
    [pytest.param(*g, id=f"{g[0]}-{g[1]}-{g[2]}", marks=slow_unless(i % 6 == 0)) for i, g in enumerate(GRIDS)],
)
def test_grids_equal_the_reference(grid: Grid, top_k: int | None, dropout: float) -> None:
    heads, kv_heads = [(2, 2), (4, 2), (3, 1)][grid.radius % 3]
    tensors = inputs(b=1, s=grid.tokens, heads=heads, kv_heads=kv_heads, d=16)
    doc_start = None
    if grid.radius == 2 and grid.tokens > 1:  # a lower end of what is seen works for grids as well
        doc_start = torch.randint(0, 4, (1, grid.tokens), generator=torch.Generator().manual_seed(1)).int()
    options: dict[str, Any] = dict(grid=grid, top_k=top_k, dropout=dropout, seed=3, doc_start=doc_start)
    assert_as_exact_as_torch(tensors, torch.float32, **options)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_grids_equal_the_reference_in_16_bits(dtype: torch.dtype) -> None:
    tensors = inputs(b=1, s=65, heads=4, kv_heads=2, d=64)
    assert_as_exact_as_torch(tensors, dtype, grid=Grid(8, 8), top_k=3, dropout=0.0)


# ---- the selection


def expected_selection(z: Tensor, seen: Tensor, top_k: int) -> Tensor:
    z = z.masked_fill(~seen, -torch.inf)
    return seen & (z >= z.topk(min(top_k, z.shape[-1]), dim=-1).values[..., -1:])


def rows_of(kind: str, s: int) -> Tensor:
    """Keys in one dimension, of which a query at 0 makes z = -k^2 / 2: z of any distribution."""
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(s, generator=generator)
    return {
        "normal": torch.randn(s, generator=generator),
        "all equal": torch.full((s,), 0.5),
        "few values": (x * 6).round() / 4,
        "half of them equal": torch.where(x < 0.5, x, 1.0),
        "one far away": torch.where(torch.arange(s) == s // 2, 1e4, x),
        "fifteen orders of magnitude": 10 ** (15 * x - 9),
        "heavy tails": torch.tan(3.1 * (x - 0.5)),
        "neighbouring floats": 1 + torch.randint(0, 40, (s,), generator=generator) * 2.0**-22,
        "subnormal": x * 1e-22,
    }[kind]


KINDS = (
    "normal", "all equal", "few values", "half of them equal", "one far away",
    "fifteen orders of magnitude", "heavy tails", "neighbouring floats", "subnormal",
)  # fmt: skip


@pytest.mark.parametrize("top_k", [1, 2, 17, 50, 98, 99])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_nearest_and_all_ties_are_kept(kind: str, top_k: int) -> None:
    """The selection is exact whatever the scores look like. sigma = 1e6 spreads the weight over all that are kept."""
    s, d = 100, 16
    k = torch.zeros(1, s, 1, d)
    k[0, :, 0, 0] = rows_of(kind, s)
    q = torch.zeros(1, 1, 1, d)
    kept = selected(q, k, window=s, top_k=top_k)
    z = -k[0, :, 0, 0] * k[0, :, 0, 0] / 2
    assert torch.equal(kept, expected_selection(z, torch.ones(s, dtype=torch.bool), top_k))


def selected(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """bool [s_k]: the keys that the one query keeps: those whose value the gradient reaches."""
    v = torch.zeros_like(k).to(DEVICE).requires_grad_()
    log_sigma = torch.full((1,), 1e6).log().to(DEVICE)
    out = krause_attention(q.to(DEVICE), k.to(DEVICE), v, log_sigma, backend="triton", **options)
    (gradient,) = torch.autograd.grad(out.sum(), v)
    by_backward = gradient[0, :, 0, 0].cpu() != 0
    values = torch.arange(k.shape[1], dtype=torch.float32)
    # The forward pass by itself: its result is the mean of the values it kept.
    v = torch.zeros_like(k)
    v[0, :, 0, 0], v[0, :, 0, 1] = values, values**2
    out = krause_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), log_sigma, backend="triton", **options)
    if float(k.abs().max()) < 1e3:  # else not even sigma makes the weights equal
        mean = torch.stack([values[by_backward].mean(), (values[by_backward] ** 2).mean()])
        torch.testing.assert_close(out[0, 0, 0, :2].cpu(), mean, rtol=1e-4, atol=1e-4)
    return by_backward


@pytest.mark.slow
def test_the_saved_separator_keeps_what_the_forward_pass_kept() -> None:
    """Generic floats, where another order of summation gives another z. Rows whose selection rounding decides (scores
    closer than that) may differ; fewer than one in a thousand do, and all others are right in output and gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 700, 2, 64, generator=generator) for _ in range(3))
    tensors = (q, k, v, torch.tensor([0.9, 1.5]))
    exact = run(tensors, backend="reference", window=128, top_k=64)
    actual = run(tensors, torch.float32, backend="triton", window=128, top_k=64)
    for name in ("out", "q"):
        # The first query sees itself alone: its gradient is 0.
        difference = ((actual[name] - exact[name]).norm(dim=-1) / exact[name].norm(dim=-1))[:, 1:]
        assert (difference > 1e-4).float().mean() < 1e-3
        assert difference.median() < 2e-6


# ---- what must hold of any result


@pytest.mark.slow
def test_every_number_of_every_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are allocated without being set; NaN in them would show."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make: Any) -> Any:
        return lambda *shape, **options: make(*shape, **options).fill_(torch.nan)

    for module in (krause_forward, krause_backward):
        monkeypatch.setattr(module.torch, "empty", poisoned(empty))
        monkeypatch.setattr(module.torch, "empty_like", poisoned(empty_like))
    starts = torch.tensor([[0] * 30 + [100] * 3 + [33] * 38, [70] * 71], dtype=torch.int32)
    for options in (
        dict(window=20, top_k=7),
        dict(window=20),
        dict(window=20, top_k=7, doc_start=starts),
        dict(window=20, doc_start=starts, dropout=0.5, seed=1),
        dict(grid=Grid(7, 10), top_k=3),
        dict(grid=Grid(7, 10)),
    ):
        result = run(inputs(b=2, s=71, heads=6, kv_heads=3, d=24), torch.float32, backend="triton", **options)
        assert all(value.isfinite().all() for value in result.values())


@pytest.mark.parametrize(
    "options",
    [dict(window=40, top_k=9), pytest.param(dict(grid=Grid(9, 11, 2), top_k=6), marks=pytest.mark.slow)],
    ids=str,
)
def test_two_runs_are_equal_bit_for_bit(options: dict[str, Any]) -> None:
    tensors = inputs(s=100, heads=4, kv_heads=2, d=32)
    first, second = (run(tensors, torch.float32, backend="triton", **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_log_sigma_gradient_follows_from_homogeneity(top_k: int | None, kv_heads: int) -> None:
    """The output stays when q, k and sigma are scaled together: dlog_sigma = -(sum q.dq + sum k.dk), head by head."""
    q, k, v, log_sigma = inputs(s=90, heads=4, kv_heads=kv_heads, d=16)
    gradient = run((q, k, v, log_sigma), torch.float32, window=30, top_k=top_k, backend="triton")
    from_q = (q * gradient["q"]).sum((0, 1, 3)).view(kv_heads, -1).sum(-1)
    from_k = (k * gradient["k"]).sum((0, 1, 3))
    actual = gradient["log_sigma"].double().view(kv_heads, -1).sum(-1)
    # Sums of s d numbers of about 1 in float32.
    torch.testing.assert_close(actual, -(from_q + from_k), rtol=1e-5, atol=2 * 90 * 16 * 2**-23)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "window", [1, pytest.param(16, marks=pytest.mark.slow), 17, pytest.param(33, marks=pytest.mark.slow)]
)
def test_nothing_outside_the_neighbourhood_has_any_influence(window: int, documents: bool) -> None:
    """The gradient of one output with respect to a value is not zero inside and exactly zero outside of it; with
    respect to a key it is exactly zero outside."""
    s, halo = 70, 5
    q, k, v, log_sigma = (
        t.to(DEVICE, torch.float32).requires_grad_() for t in inputs(b=1, s=s, heads=2, kv_heads=1, halo=halo, d=16)
    )
    starts = [2] * 10 + [15] * 1 + [16] * 1 + [17] * 58
    doc_start = torch.tensor([starts], dtype=torch.int32) if documents else None
    seen = visible(s, s + halo, window, None, doc_start, torch.device("cpu"))[0]
    on = None if doc_start is None else doc_start.to(DEVICE)
    out = krause_attention(q, k, v, log_sigma, window=window, doc_start=on, backend="triton")
    for i in random.Random(window).sample(range(s), 8) + [0, 31, 32, 63, 64, s - 1]:
        dq, dk, dv = torch.autograd.grad(out[:, i].sum(), (q, k, v), retain_graph=True)
        assert torch.equal((dv != 0).any(-1)[0, :, 0].cpu(), seen[i])
        assert not dk[0, ~seen[i]].any()
        assert not dq[0, torch.arange(s) != i].any()


@pytest.mark.parametrize("grid", [Grid(5, 7, 1), Grid(5, 7, 2, "chebyshev", cls=False)], ids=str)
def test_nothing_outside_the_grids_neighbourhood_has_any_influence(grid: Grid) -> None:
    s, seen = grid.tokens, grid.mask()
    q, k, v, log_sigma = (
        t.to(DEVICE, torch.float32).requires_grad_() for t in inputs(b=1, s=s, heads=2, kv_heads=1, d=16)
    )
    out = krause_attention(q, k, v, log_sigma, grid=grid, backend="triton")
    for i in range(0, s, 3):
        dq, dk, dv = torch.autograd.grad(out[:, i].sum(), (q, k, v), retain_graph=True)
        assert torch.equal((dv != 0).any(-1)[0, :, 0].cpu(), seen[i])
        assert not dk[0, ~seen[i]].any()
        assert not dq[0, torch.arange(s) != i].any()


@pytest.mark.parametrize("heads, kv_heads, halo, window, documents", [(2, 2, 0, 20, False), (6, 2, 9, 90, True)])
def test_windowed_softmax_by_the_same_kernels(
    heads: int, kv_heads: int, halo: int, window: int, documents: bool
) -> None:
    q, k, v, _ = inputs(b=2, s=70, heads=heads, kv_heads=kv_heads, halo=halo, d=16)
    doc_start = (torch.arange(70, dtype=torch.int32) // 25 * 25 + halo).expand(2, 70) if documents else None
    upstream = on_grid(*q.shape, generator=torch.Generator().manual_seed(7))

    def with_gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        device = DEVICE if backend == "triton" else "cpu"
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        starts = None if doc_start is None else doc_start.to(device)
        out = _by_kernel(*leaves, window, starts, backend)
        return [x.cpu().double() for x in (out, *torch.autograd.grad(out, leaves, upstream.to(out)))]

    seen = causal_mask(70, 70 + halo, doc_start, q.device, window)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    heads_first = (x.transpose(1, 2) for x in leaves)
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    expected = [out, *torch.autograd.grad(out, leaves, upstream)]
    for actual, exact in zip(with_gradients(torch.float32, "triton"), expected, strict=True):
        assert error(actual, exact, 1) < 1e-5  # float32, tf32x3 products; sums of at most 90 terms


def test_layout_in_memory_does_not_matter() -> None:
    tensors = inputs(b=2, s=90, heads=4, kv_heads=2, d=16)
    doc_start = torch.arange(90, dtype=torch.int32).expand(2, 90) // 25 * 25
    options: dict[str, Any] = dict(window=20, top_k=7, backend="triton")
    expected = run(tensors, torch.float32, doc_start=doc_start.contiguous(), **options)
    laid = *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:3]), tensors[3]
    for starts in (doc_start.t().contiguous().t(), F.pad(doc_start, (3, 2), value=1000)[:, 3:-2]):
        assert not starts.is_contiguous()
        found = run(laid, torch.float32, doc_start=starts, **options)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("window", [16, 20])
def test_a_key_that_is_infinitely_far_changes_nothing_else(window: int) -> None:
    """Its z is -inf, in windows that fill their tiles and in others."""
    q, k, v, log_sigma = inputs(b=1, s=60, heads=2, kv_heads=2, d=16)

    def attend(far: float, dtype: torch.dtype, backend: str) -> Tensor:
        keys = k.clone()
        keys[0, 33, 0, 0] = far
        device = DEVICE if backend == "triton" else "cpu"
        leaves = [x.to(device, dtype) for x in (q, keys, v, log_sigma)]
        out = krause_attention(*leaves, window=window, top_k=7, backend=backend)
        return out[:, torch.arange(60) != 33].cpu()  # the query there is as far away

    exact = attend(1e9, torch.float64, "reference")
    baseline = error(attend(1e9, torch.float32, "reference"), exact, exact.numel())
    allowed = 2 * baseline + 2 * 16**0.5 * torch.finfo(torch.float32).eps  # see `assert_as_exact_as_torch`
    assert error(attend(1e20, torch.float32, "triton"), exact, exact.numel()) <= allowed


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_keys_and_queries_that_are_not_finite_reach_no_row_but_those_that_see_them(value: float) -> None:
    tensors = [t.to(DEVICE, torch.float32) for t in inputs(b=2, s=90, heads=2, kv_heads=2, d=16)]
    whole = krause_attention(*tensors, window=20, top_k=7, backend="triton")
    for spoiled in (0, 1):
        changed = [t.clone() for t in tensors]
        changed[spoiled][0, 40, 0, 3] = value
        out = krause_attention(*changed, window=20, top_k=7, backend="triton")
        assert torch.equal(out[1], whole[1])
        assert torch.equal(out[0, :40], whole[0, :40])
        assert torch.equal(out[0, 60:], whole[0, 60:])
        assert torch.equal(out[0, :, 1], whole[0, :, 1])
        if value != value:  # and those they reach
            rows = slice(40, 60) if spoiled else slice(40, 41)
            assert out[0, rows, 0].isnan().all()


# ---- what it takes


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(d=136), "heads of at most 128 numbers, not 136; use 'blocked' or 'auto'"),
        (dict(dtype=torch.float64), "float32, float16 and bfloat16, not torch.float64; use 'blocked'"),
        (dict(window=2000, top_k=5, s=1500), "a selection among at most 1024 keys, not 1500; use 'blocked'"),
        (dict(grid=Grid(40, 40), window=None, top_k=5, s=1601), "at most 1024 keys, not 1601; use 'reference'"),
    ],
    ids=str,
)
def test_what_it_cannot_take_is_said_with_what_can(changes: dict[str, Any], says: str) -> None:
    settings: dict[str, Any] = dict(d=16, dtype=torch.float32, window=8, top_k=3, s=9, grid=None) | changes
    d, s = settings.pop("d"), settings.pop("s")
    dtype = settings.pop("dtype")
    q, k, v = (torch.zeros(1, s, 1, d, dtype=dtype, device=DEVICE) for _ in range(3))
    with pytest.raises(ValueError, match=says):
        krause_attention(q, k, v, torch.zeros(1, device=DEVICE), backend="triton", **settings)


def test_without_a_gpu_it_says_what_is_missing() -> None:
    script = (
        "import torch; from megakrause import krause_attention; x = torch.zeros(1, 4, 1, 16);"
        "krause_attention(x, x, x, torch.zeros(1), window=2, backend='triton')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ValueError: backend = 'triton' takes CUDA tensors, not cpu ones" in done.stderr.splitlines()[-1]
    assert "use 'blocked' or 'auto'" in done.stderr.splitlines()[-1]


def test_programs_share_a_kv_head_and_never_two() -> None:
    for heads, kv_heads, pack in [(1, 1, 1), (8, 2, 4), (6, 1, 2), (7, 1, 1), (64, 1, 16), (12, 3, 4)]:
        q, k = torch.empty(1, 5, heads, 16), torch.empty(1, 5, kv_heads, 16)
        settings: dict[str, Any] = dict(window=2, grid=None, top_k=None, docs=False, dropout=0.0, seed=0)
        assert Launch.of(q, k, **settings).pack == pack

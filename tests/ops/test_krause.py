"""Krause attention: both backends against each other, against independent oracles, and at the edges of their arguments.

The Triton backend has tests of its own beside this file.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megakrause import Grid, krause_attention
from megakrause.ops import krause_blocked
from megakrause.ops.krause_reference import visible
from tests.ops.cases import NAMES, Case, error, inputs, on_grid, pairwise, run

BACKENDS = ("reference", "blocked")


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-13) -> None:
    """float64 rounds at 1e-16; sums of a few hundred products of mixed sign lose less than three digits of that."""
    terms = expected["out"].numel()  # as many numbers of about 1 go into the backward pass
    for name, value in expected.items():
        assert error(actual[name], value, terms) <= tolerance, name


# ---- the blocked backend against the reference


CASES = [
    Case(**settings)
    for settings in pairwise(
        {
            "s": [1, 2, 63, 64, 111, 130, 300],
            "window": [1, 2, 5, 16, 63, 64, 100, 257],
            "top_k": ["none", "1", "3", "W-1", "W", "W+1"],
            "heads": [(2, 2), (4, 2), (4, 1), (8, 1)],
            "halo": ["none", "W-1", "less", "more"],
            "documents": ["none", "short", "long", "empty rows"],
            "sigmas": ["one a head", "one"],
            "dropout": [0.0, 0.3],
        }
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocked_equals_reference(case: Case) -> None:
    expected = run(case.tensors(), backend="reference", **case.options())
    actual = run(case.tensors(), backend="blocked", **case.options())
    assert all(value.isfinite().all() for value in expected.values())
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_blocked_is_as_exact_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    """At most twice the error that the reference itself makes in this dtype, and two roundings: of float32, in which
    both compute."""
    # What both get must be the same numbers, so log_sigma too is cut to what bf16 holds.
    tensors = tuple(t.bfloat16().double() for t in case.tensors())
    exact = run(tensors, backend="reference", **case.options())
    baseline = run(tensors, dtype, backend="reference", **case.options())
    actual = run(tensors, dtype, backend="blocked", **case.options())
    terms = exact["out"].numel()
    for name, value in exact.items():
        allowed = 2 * error(baseline[name], value, terms) + 2 * torch.finfo(torch.float32).eps
        assert error(actual[name], value, terms) <= allowed, name


@pytest.mark.parametrize("at_once", [1, 2**14])
def test_blocked_does_not_depend_on_how_much_it_does_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    tensors = inputs(s=111, heads=4)
    options: dict[str, Any] = dict(window=20, top_k=5, dropout=0.2, seed=5, backend="blocked")
    whole = run(tensors, **options)
    monkeypatch.setattr(krause_blocked, "SCORES_AT_ONCE", at_once)
    assert_close(run(tensors, **options), whole)


def test_auto_is_one_of_the_backends() -> None:
    tensors = inputs(s=30)
    assert_close(run(tensors, window=7, top_k=2), run(tensors, window=7, top_k=2, backend="blocked"), tolerance=0)
    q, k, v, log_sigma = tensors
    last = krause_attention(q[:, -1:], k, v, log_sigma, window=7, top_k=2)
    everywhere = krause_attention(q, k, v, log_sigma, window=7, top_k=2, backend="reference")
    torch.testing.assert_close(last, everywhere[:, -1:], rtol=1e-12, atol=1e-13)
    q, k, v, log_sigma = inputs(s=12)
    grid = Grid(3, 4, cls=False)
    reference = run((q, k, v, log_sigma), grid=grid, backend="reference")
    assert_close(run((q, k, v, log_sigma), grid=grid), reference, tolerance=0)


# ---- independent oracles


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_log_sigma_gradient_follows_from_homogeneity(backend: str, top_k: int | None, kv_heads: int) -> None:
    """The output stays when q, k and sigma are scaled together: dlog_sigma = -(sum q.dq + sum k.dk), head by head."""
    q, k, v, log_sigma = inputs(s=70, heads=4, kv_heads=kv_heads)
    gradient = run((q, k, v, log_sigma), window=12, top_k=top_k, backend=backend)
    from_q = (q * gradient["q"]).sum((0, 1, 3)).view(kv_heads, -1).sum(-1)
    from_k = (k * gradient["k"]).sum((0, 1, 3))
    expected = -(from_q + from_k)  # of the query heads that share a kv head, together
    torch.testing.assert_close(gradient["log_sigma"].view(kv_heads, -1).sum(-1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_depends_on_distances_alone(backend: str) -> None:
    q, k, v, log_sigma = inputs(s=70)
    shift = on_grid(1, 1, 2, 4, generator=torch.Generator().manual_seed(3))
    here = krause_attention(q, k, v, log_sigma, window=9, top_k=4, backend=backend)
    there = krause_attention(q + shift, k + shift, v, log_sigma, window=9, top_k=4, backend=backend)
    torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("documents", [False, True])
def test_without_selection_it_is_softmax_attention_with_a_key_bias(
    backend: str, kv_heads: int, documents: bool
) -> None:
    q, k, v, log_sigma = (t.requires_grad_() for t in inputs(s=50, heads=4, kv_heads=kv_heads, halo=6))
    doc_start = torch.tensor([[3] * 20 + [26] * 30, [0] * 49 + [55]], dtype=torch.int32) if documents else None
    inverse = torch.exp(-2 * log_sigma)
    wide_k, wide_v = (x.repeat_interleave(4 // kv_heads, dim=2).transpose(1, 2) for x in (k, v))  # b h s_k d
    bias = -wide_k.square().sum(-1) / 2 * inverse[:, None]  # b h s_k
    position = torch.arange(56)
    query = position[6:, None]
    seen = ((position <= query) & (position > query - 10)).expand(2, 50, 56)
    if doc_start is not None:
        seen = seen & (position >= doc_start[:, :, None])
    bias = bias[:, :, None].masked_fill(~seen[:, None], -torch.inf)
    scaled = (q * inverse[:, None]).transpose(1, 2)
    out = F.scaled_dot_product_attention(scaled, wide_k, wide_v, attn_mask=bias, scale=1.0).transpose(1, 2)
    upstream = on_grid(*out.shape, generator=torch.Generator().manual_seed(7))
    gradients = torch.autograd.grad(out, (q, k, v, log_sigma), upstream)
    expected = {"out": out.detach()} | dict(zip(NAMES, gradients, strict=True))
    tensors = tuple(t.detach() for t in (q, k, v, log_sigma))
    assert_close(run(tensors, window=10, doc_start=doc_start, backend=backend), expected)


def from_the_formula(q: Tensor, k: Tensor, v: Tensor, log_sigma: Tensor, seen: Tensor, top_k: int | None) -> Tensor:
    """The definition, one number after the other, from distances: q, k, v [b, s, h, d], seen [s, s]."""
    out = torch.zeros_like(q)
    for b, i, h in product(*map(range, q.shape[:3])):
        scores = {}
        for j in seen[i].nonzero()[:, 0].tolist():
            distance = sum((x - y) ** 2 for x, y in zip(q[b, i, h].tolist(), k[b, j, h].tolist(), strict=True))
            scores[j] = -distance / (2 * math.exp(log_sigma[h]) ** 2)
        least = sorted(scores.values(), reverse=True)[:top_k][-1]
        weights = {j: math.exp(score) for j, score in scores.items() if score >= least}
        for j, weight in weights.items():
            out[b, i, h] += weight / sum(weights.values()) * v[b, j, h]
    return out


def generic(*shape: int) -> Tensor:
    """Numbers without ties, so that it does not matter in which form scores are compared."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_window_attention_is_the_formula(backend: str, top_k: int | None) -> None:
    q, k, v = generic(3, 2, 11, 2, 3).unbind()
    log_sigma = torch.tensor([0.1, -0.4], dtype=torch.float64)
    seen = torch.tensor([[0 <= i - j < 5 for j in range(11)] for i in range(11)])
    out = krause_attention(q, k, v, log_sigma, window=5, top_k=top_k, backend=backend)
    torch.testing.assert_close(out, from_the_formula(q, k, v, log_sigma, seen, top_k), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(2, 3, radius=2, metric="chebyshev", cls=False)], ids=str)
def test_grid_attention_is_the_formula(grid: Grid, top_k: int | None) -> None:
    q, k, v = generic(3, 2, grid.tokens, 2, 3).unbind()
    log_sigma = torch.tensor([0.1, -0.4], dtype=torch.float64)
    out = krause_attention(q, k, v, log_sigma, grid=grid, top_k=top_k)
    torch.testing.assert_close(out, from_the_formula(q, k, v, log_sigma, grid.mask(), top_k), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("neighbourhood", ["reference", "blocked", "grid"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_gradients_are_those_of_finite_differences(neighbourhood: str, top_k: int | None) -> None:
    q, k, v = (x.requires_grad_() for x in generic(3, 1, 7, 2, 2).unbind())
    k, v = (x[:, :, :1].detach().requires_grad_() for x in (k, v))
    log_sigma = torch.tensor([0.1, -0.4], dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = (
        {"grid": Grid(2, 3)} if neighbourhood == "grid" else {"window": 4, "backend": neighbourhood}
    )
    assert torch.autograd.gradcheck(lambda *x: krause_attention(*x, top_k=top_k, **options), (q, k, v, log_sigma))


# ---- neighbourhoods and selection


def weights(q: Tensor, k: Tensor, log_sigma: Tensor, **options: Any) -> Tensor:
    """p, [b, s, h, s_k]: the output when the values are the unit vectors."""
    s_k, d = k.shape[1], k.shape[3]
    assert s_k <= 64
    pad = (0, s_k - d)
    v = torch.eye(s_k, dtype=q.dtype)[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
    return krause_attention(F.pad(q, pad), F.pad(k, pad), v, log_sigma, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_sees_window_keys_itself_included(backend: str) -> None:
    q, k, _, log_sigma = inputs(b=1, s=5, heads=1, kv_heads=1)
    seen = weights(q, k, log_sigma, window=3, backend=backend)[0, :, 0] > 0
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert seen.int().tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("documents", [False, True])
def test_nothing_outside_the_neighbourhood_has_any_influence(backend: str, documents: bool) -> None:
    """The gradient of one output with respect to a value is not zero inside and exactly zero outside of it; with
    respect to a key it is exactly zero outside."""
    s, halo, window = 40, 5, 17
    q, k, v, log_sigma = (t.requires_grad_() for t in inputs(b=1, s=s, heads=2, kv_heads=1, halo=halo))
    starts = [2] * 10 + [15] * 1 + [16] * 1 + [17] * 28
    doc_start = torch.tensor([starts], dtype=torch.int32) if documents else None
    seen = visible(s, s + halo, window, None, doc_start, q.device)[0]
    out = krause_attention(q, k, v, log_sigma, window=window, doc_start=doc_start, backend=backend)
    for i in range(s):
        dq, dk, dv = torch.autograd.grad(out[:, i].sum(), (q, k, v), retain_graph=True)
        assert torch.equal((dv != 0).any(-1)[0, :, 0], seen[i])
        assert not dk[0, ~seen[i]].any()
        assert not dq[0, torch.arange(s) != i].any()
        if seen[i].sum() > 1:
            assert dk[0, seen[i]].any(-1).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_keeps_the_nearest_keys_and_all_ties(backend: str) -> None:
    q = torch.zeros(1, 6, 1, 1)
    k = torch.tensor([2.0, -1.0, 1.0, 3.0, 1.0, 0.5])[None, :, None, None]  # distances; keys 1, 2 and 4 are level
    log_sigma = torch.zeros(1)

    def kept(top_k: int | None) -> list[int]:
        return (weights(q, k, log_sigma, window=6, top_k=top_k, backend=backend)[0, -1, 0] > 0).nonzero()[:, 0].tolist()

    assert [kept(n) for n in (1, 2, 3, 4)] == [[5], [1, 2, 4, 5], [1, 2, 4, 5], [1, 2, 4, 5]]
    assert kept(5) == [0, 1, 2, 4, 5]
    assert kept(6) == kept(7) == kept(None) == [0, 1, 2, 3, 4, 5]
    p = weights(q, k, log_sigma, window=6, top_k=2, backend=backend)[0, -1, 0]
    assert p[1] == p[2] == p[4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_at_most_top_k_keys_keep_all(backend: str) -> None:
    q, k, _, log_sigma = inputs(b=1, s=30, heads=1, kv_heads=1)
    kept = (weights(q, k, log_sigma, window=12, top_k=5, backend=backend)[0, :, 0] > 0).sum(-1)
    assert kept[:5].tolist() == [1, 2, 3, 4, 5]
    assert (kept[5:] >= 5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_gives_zeros_and_passes_no_gradient(backend: str) -> None:
    tensors = inputs(b=1, s=20)
    doc_start = torch.zeros(1, 20, dtype=torch.int32)
    doc_start[0, [0, 7, 19]] = 20
    result = run(tensors, window=6, top_k=3, doc_start=doc_start, backend=backend)
    assert not result["out"][0, [0, 7, 19]].any()
    assert not result["q"][0, [0, 7, 19]].any()
    assert result["out"][0, 1:7].all(-1).any()
    assert all(value.isfinite().all() for value in result.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_may_begin_anywhere_before_the_keys(backend: str) -> None:
    q, k, v, log_sigma = inputs(b=1, s=60)
    last = q[:, -4:]
    anywhere = torch.full((1, 4), torch.iinfo(torch.int32).min, dtype=torch.int32)
    expected = krause_attention(last, k, v, log_sigma, window=8, top_k=3, backend=backend)
    found = krause_attention(last, k, v, log_sigma, window=8, top_k=3, doc_start=anywhere, backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_that_is_not_a_number_is_seen_in_every_row_that_sees_it(backend: str) -> None:
    q, k, v, log_sigma = inputs(b=1, s=60)
    k = k.clone()
    k[0, 20] = torch.nan
    out = krause_attention(q, k, v, log_sigma, window=10, top_k=5, backend=backend)
    assert out[0, 20:30].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    q, k = (torch.zeros(0, 5, heads, 16, requires_grad=True) for heads in (4, 2))
    out = krause_attention(q, k, k, torch.zeros(4), window=3, top_k=2, backend=backend)
    assert out.shape == q.shape
    out.sum().backward()
    assert k.grad is not None and k.grad.shape == k.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_packed_in_one_sequence_are_as_alone(backend: str) -> None:
    q, k, v, log_sigma = inputs(b=1, s=60)
    lengths = [1, 30, 1, 1, 20, 7]
    doc_start = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)]).int()[None]
    options: dict[str, Any] = dict(window=9, top_k=4, backend=backend)
    packed = krause_attention(q, k, v, log_sigma, doc_start=doc_start, **options)
    parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    alone = torch.cat([krause_attention(*part, log_sigma, **options) for part in parts], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("halo", [16, 17, 40])
def test_a_sequence_cut_in_two_with_a_halo_is_the_whole(backend: str, halo: int) -> None:
    """What context parallelism and decoding rely on. Keys further back than the window are as good as not there."""
    q, k, v, log_sigma = inputs(s=90)
    doc_start = torch.tensor([[0] * 45 + [45] * 8 + [53] * 37, [0] * 90], dtype=torch.int32)
    options: dict[str, Any] = dict(window=17, top_k=6, backend=backend)
    whole = krause_attention(q, k, v, log_sigma, doc_start=doc_start, **options)
    first = 50 - halo
    start = doc_start[:, 50:] - first
    second = krause_attention(q[:, 50:], k[:, first:], v[:, first:], log_sigma, doc_start=start, **options)
    torch.testing.assert_close(second, whole[:, 50:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("radius", range(4))
@pytest.mark.parametrize("metric", ["manhattan", "chebyshev"])
@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (4, 2)])
def test_grid_mask(height: int, width: int, metric: Any, radius: int, cls: bool) -> None:
    grid = Grid(height, width, radius, metric, cls)
    patches = list(product(range(height), range(width)))
    tokens: list[tuple[int, int] | None] = [None, *patches] if cls else [*patches]

    def sees(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
        if a is None or b is None:
            return True
        down, across = abs(a[0] - b[0]), abs(a[1] - b[1])
        return (down + across if metric == "manhattan" else max(down, across)) <= radius

    assert grid.tokens == len(tokens)
    assert grid.mask().tolist() == [[sees(a, b) for b in tokens] for a in tokens]


# ---- dropout


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_weights_by_seed_and_scales_the_others(backend: str) -> None:
    q, k, _, log_sigma = inputs(b=2, s=60)
    options: dict[str, Any] = dict(window=60, top_k=30, backend=backend)
    p = weights(q, k, log_sigma, **options)
    dropped = weights(q, k, log_sigma, dropout=0.25, seed=1, **options)
    stays = dropped > 0
    torch.testing.assert_close(dropped[stays], p[stays] / 0.75, rtol=1e-12, atol=0)
    share = stays.sum() / (p > 0).sum()
    assert abs(share - 0.75) < 4 * (0.25 * 0.75 / (p > 0).sum()) ** 0.5  # four standard deviations
    assert torch.equal(dropped, weights(q, k, log_sigma, dropout=0.25, seed=1, **options))
    other = weights(q, k, log_sigma, dropout=0.25, seed=2, **options)
    assert not torch.equal(dropped > 0, other > 0)
    both = (p[0, :, 0] > 0) & (p[1, :, 1] > 0)
    assert not torch.equal(stays[0, :, 0][both], stays[1, :, 1][both])  # sequences and heads draw their own


# ---- memory


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = [
            t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor)
        ]
        self.numel = max([self.numel, *storages])
        return result


def memory(s: int, backend: str) -> tuple[int, int]:
    """Bytes kept for the backward pass, and elements of the largest tensor that ever lived."""
    tensors = [t.requires_grad_() for t in inputs(b=1, s=s)]
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        krause_attention(*tensors, window=32, top_k=8, backend=backend).sum().backward()
    return sum(saved.values()), largest.numel


def test_memory_of_the_blocked_backend_is_linear() -> None:
    # A multiple of the lengths at which blocks come out even; scores are worked on in parts of constant size beyond.
    short, long = memory(1024, "blocked"), memory(2048, "blocked")
    assert long[0] <= 2.05 * short[0]
    assert long[1] <= 2.05 * short[1]
    dense_short, dense_long = memory(256, "reference"), memory(512, "reference")
    assert dense_long[0] > 3.5 * dense_short[0] and dense_long[1] > 3.5 * dense_short[1]  # so this does measure


# ---- autograd


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(), ("q",), ("k",), ("v",), ("log_sigma",), ("q", "v")], ids=str)
def test_gradients_flow_only_where_they_are_wanted(backend: str, wanted: tuple[str, ...]) -> None:
    tensors = inputs(s=30)
    everything = run(tensors, window=7, top_k=3, backend=backend)
    leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in zip(NAMES, tensors, strict=True)}
    out = krause_attention(*leaves.values(), window=7, top_k=3, backend=backend)
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.backward(on_grid(*out.shape, generator=torch.Generator().manual_seed(7)))
    for name, leaf in leaves.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, everything[name], rtol=1e-12, atol=1e-13)
        else:
            assert leaf.grad is None


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "head size first": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "positions last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "every other": lambda x: torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2],
    "part of a larger one": lambda x: F.pad(x, (1, 1, 1, 1, 1, 1))[:, 1:-1, 1:-1, 1:-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 7])
@pytest.mark.parametrize("b, s, heads", [(1, 32, 1), (2, 30, 4)])
def test_layout_in_memory_does_not_matter(layout: str, window: int, b: int, s: int, heads: int) -> None:
    q, k, v, log_sigma = inputs(b=b, s=s, heads=heads, kv_heads=max(1, heads // 2))
    upstream = on_grid(*q.shape, generator=torch.Generator().manual_seed(7))
    options: dict[str, Any] = dict(window=window, top_k=3, backend="blocked")
    expected = run((q, k, v, log_sigma), **options)
    laid = [LAYOUTS[layout](x).requires_grad_() for x in (q, k, v)]
    assert all(torch.equal(a, b) for a, b in zip(laid, (q, k, v), strict=True))
    log_sigma.requires_grad_()
    out = krause_attention(*laid, log_sigma, **options)
    gradients = torch.autograd.grad(out, [*laid, log_sigma], LAYOUTS[layout](upstream))
    assert_close({"out": out} | dict(zip(NAMES, gradients, strict=True)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_written_to_and_may_share_memory(backend: str) -> None:
    q, k, v, log_sigma = inputs(s=30)
    before = [t.clone() for t in (q, k, v, log_sigma)]
    run((q, k, v, log_sigma), window=7, top_k=3, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, log_sigma), before, strict=True))
    shared = q[:1, :1].expand(2, 30, -1, -1)  # strides of 0
    torch.testing.assert_close(
        krause_attention(shared, shared, shared, log_sigma, window=7, backend=backend), shared, rtol=1e-12, atol=1e-13
    )


# ---- numbers that are not numbers


def spoiled(backend: str, name: str, value: float, position: int) -> dict[str, Tensor]:
    """For output and gradients: bool [b, s, h], where they are not finite after the middle one of three sequences got
    a bad number at one position of all its heads."""
    tensors = dict(zip(NAMES, inputs(b=3, s=64), strict=True))
    tensors[name][1, position] = value
    result = run(tuple(tensors.values()), window=9, top_k=4, backend=backend)
    return {key: ~result[key].isfinite().all(-1) for key in ("out", "q", "k", "v")}


BAD_NUMBERS = [(name, value, position) for name in "qkv" for value in (math.nan, math.inf) for position in (0, 30, 63)]


@pytest.mark.parametrize("name, value, position", BAD_NUMBERS)
def test_a_bad_number_stays_in_its_sequence(name: str, value: float, position: int) -> None:
    for key, bad in spoiled("reference", name, value, position).items():
        assert not bad[0].any() and not bad[2].any(), key


@pytest.mark.parametrize("name, value, position", BAD_NUMBERS)
def test_a_bad_number_goes_no_further_than_the_edges_of_its_neighbours(name: str, value: float, position: int) -> None:
    """Blocks of two sequences, or of two heads, that lie side by side share a matrix product, in which 0 times a bad
    number is one: the first positions of the one behind and the last keys of the one before, at most P of them."""
    reach = 16  # P for a window of 9
    for key, bad in spoiled("blocked", name, value, position).items():
        before, behind = bad[0], bad[2]
        assert not before[:-reach].any() and not behind[reach:].any(), key
        assert not before[:, 0].any() and not behind[:, 1].any(), key  # heads that are no neighbours
        if reach <= position < 64 - reach:
            assert not before.any() and not behind.any(), key


# ---- arguments


def arguments(**changes: Any) -> dict[str, Any]:
    q, k, v, log_sigma = inputs(b=2, s=5, heads=4, kv_heads=2)
    return dict(q=q, k=k, v=v, log_sigma=log_sigma, window=3) | changes


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(q=zeros(5, 4, 4)), r"q \[5, 4, 4\]"),
        (dict(k=zeros(5, 2, 4), v=zeros(5, 2, 4)), r"k \[5, 2, 4\]"),
        (dict(v=zeros(2, 6, 2, 4)), r"v \[2, 6, 2, 4\]"),
        (dict(k=zeros(3, 5, 2, 4), v=zeros(3, 5, 2, 4)), r"k \[3, 5, 2, 4\] do not fit"),
        (dict(k=zeros(2, 5, 2, 6), v=zeros(2, 5, 2, 6)), r"k \[2, 5, 2, 6\] do not fit"),
        (dict(k=zeros(2, 4, 2, 4), v=zeros(2, 4, 2, 4)), "s_k >= s"),
        (dict(q=zeros(2, 0, 4, 4)), "s_k >= s >= 1"),
        (dict(k=zeros(2, 5, 3, 4), v=zeros(2, 5, 3, 4)), "h a multiple of h_kv"),
        (dict(q=zeros(2, 5, 4, 4, dtype=torch.float32)), "float32.*one floating dtype"),
        (dict(v=zeros(2, 5, 2, 4, dtype=torch.bfloat16)), "bfloat16.*one floating dtype"),
        ({n: zeros(2, 5, 2, 4, dtype=torch.int64) for n in "qkv"}, "int64.*one floating dtype"),
        (dict(log_sigma=zeros(3)), r"log_sigma \[3\].*\[4\].*\[1\]"),
        (dict(log_sigma=zeros(4, 1)), r"log_sigma \[4, 1\]"),
        (dict(log_sigma=zeros()), r"log_sigma \[\]"),
        (dict(window=None), "window = None, grid = None; give exactly one"),
        (dict(grid=Grid(1, 4)), "window = 3, grid = .*; give exactly one"),
        (dict(window=0), "window = 0; it must be at least 1"),
        (dict(window=-2), "window = -2; it must be at least 1"),
        (dict(window=None, grid=Grid(2, 2, cls=False)), "s = 5.*needs 4"),
        (dict(window=None, grid=Grid(1, 4), q=zeros(2, 4, 4, 4)), "s = 4, s_k = 5.*needs 5 of both"),
        (dict(top_k=0), "top_k = 0; it must be at least 1"),
        (dict(top_k=-1), "top_k = -1"),
        (dict(doc_start=zeros(2, 4, dtype=torch.int32)), r"doc_start.*\[2, 4\].*\[2, 5\]"),
        (dict(doc_start=zeros(2, 5, dtype=torch.int64)), "doc_start is torch.int64.*int32"),
        (dict(dropout=1.0, seed=1), "dropout = 1.0; it must be at least 0 and below 1"),
        (dict(dropout=-0.1, seed=1), "dropout = -0.1"),
        (dict(dropout=math.nan, seed=1), "dropout = nan"),
        (dict(dropout=0.1), "dropout = 0.1 needs a seed"),
        (dict(dropout=0.1, seed=-1), "seed = -1; it must be at least 0"),
        (dict(dropout=0.1, seed=2**63), "seed = 9223372036854775808; it must be .* below 2"),
        (dict(log_sigma=torch.zeros(4, device="meta")), "q on cpu.*log_sigma on meta; they must be on one device"),
        (dict(backend="fast"), "backend = 'fast'; use one of auto, reference, blocked"),
        (dict(backend="blocked", window=None, grid=Grid(1, 4)), "backend = 'blocked' takes a window, no grid"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], says: str) -> None:
    krause_attention(**arguments())
    with pytest.raises(ValueError, match=says):
        krause_attention(**arguments(**changes))


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(height=0), "0 x 3 patches"),
        (dict(width=0), "2 x 0 patches"),
        (dict(radius=-1), "radius = -1; it must be at least 0"),
        (dict(metric="euclid"), "metric = 'euclid'; use 'manhattan' or 'chebyshev'"),
    ],
)
def test_grids_that_cannot_be_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Grid(**({"height": 2, "width": 3} | changes))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_autocast_does_not_lower_the_precision_of_float32_inputs(backend: str) -> None:
    q, k, v = (torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    log_sigma = torch.zeros(2)
    expected = krause_attention(q, k, v, log_sigma, window=8, top_k=3, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(krause_attention(q, k, v, log_sigma, window=8, top_k=3, backend=backend), expected)

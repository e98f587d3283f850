"""One token at a time over a ring of keys is Krause attention over the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megakrause import krause_attention
from megakrause.ops.krause_decode import KeyRing, krause_decode, krause_decode_operator
from tests.ops.cases import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# b, h, h_kv, d, window, top_k, positions
SHAPES = [
    (2, 4, 2, 16, 7, 3, 20),
    (1, 3, 3, 24, 16, None, 40),
    (1, 8, 1, 32, 100, 20, 130),
    (2, 2, 1, 8, 33, 40, 50),
    (1, 6, 2, 16, 1, 1, 5),
    (1, 16, 1, 96, 130, 64, 150),
    (1, 2, 2, 128, 64, 1, 70),
]


def lattice(*shape: int, seed: int) -> Tensor:
    """Multiples of 1/8, of which z is exact."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 8).round() / 8


def inputs(b: int, s: int, h: int, h_kv: int, d: int, backend: str = "torch") -> tuple[Tensor, ...]:
    """q, k, v and log_sigma, where the backend works."""
    device, kv = DEVICE if backend == "triton" else "cpu", (b, s, h_kv, d)
    tensors = lattice(b, s, h, d, seed=0), lattice(*kv, seed=1), lattice(*kv, seed=2), torch.linspace(0, 1, h)
    return tuple(x.to(device) for x in tensors)


def at(position: int, like: Tensor) -> Tensor:
    return torch.full((len(like),), position, dtype=torch.int32, device=like.device)


@pytest.mark.parametrize("prompt", [0, 1, 5, 19, 200])
@pytest.mark.parametrize("b, h, h_kv, d, window, top_k, s", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_token_by_token_equals_the_whole(
    backend: str, b: int, h: int, h_kv: int, d: int, window: int, top_k: int | None, s: int, prompt: int
) -> None:
    prompt = min(prompt, s - 1)
    start = max(prompt, s - 12 if backend == "triton" else 0)  # the interpreter is slow
    q, k, v, log_sigma = inputs(b, s, h, h_kv, d, backend)
    exact = (x.double() for x in (q, k, v, log_sigma))
    expected = krause_attention(*exact, window=window, top_k=top_k, backend="reference")
    ring = KeyRing(window, k)
    ring.fill(k[:, :prompt], v[:, :prompt], 0)
    ring.fill(k[:, prompt:start], v[:, prompt:start], prompt)
    for i in range(start, s):
        step = (x[:, i : i + 1] for x in (q, k, v))
        out = krause_decode(*step, log_sigma, ring, at(i, q), top_k=top_k, backend=backend)
        # Each sum has at most `window` terms of a convex combination of values.
        torch.testing.assert_close(out.double(), expected[:, i : i + 1], rtol=0, atol=window * 4e-7)
    before_k, before_v = ring.before(s)
    assert torch.equal(before_k, k[:, max(0, s - window + 1) :])
    assert torch.equal(before_v, v[:, max(0, s - window + 1) :])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sequences_of_a_batch_may_stand_at_different_positions(backend: str) -> None:
    window, s = 9, 30
    q, k, v, log_sigma = inputs(3, s, 4, 2, 16, backend)
    positions = [4, 9, 29]
    ring = KeyRing(window, k)
    for n, position in enumerate(positions):
        one = KeyRing(window, k[:1])
        one.fill(k[n : n + 1, :position], v[n : n + 1, :position], 0)
        ring.k[n], ring.v[n], ring.half_squares[n] = one.k[0], one.v[0], one.half_squares[0]
    index = torch.arange(3, device=q.device), torch.tensor(positions, device=q.device)
    out = krause_decode(
        *(x[index][:, None] for x in (q, k, v)),
        log_sigma,
        ring,
        index[1].int(),
        top_k=4,
        backend=backend,
    )
    expected = krause_attention(q, k, v, log_sigma, window=window, top_k=4, backend="reference")
    torch.testing.assert_close(out[:, 0], expected[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_lies_in_slots_not_yet_written_does_not_matter(backend: str) -> None:
    q, k, v, log_sigma = inputs(1, 3, 2, 1, 16, backend)
    ring = KeyRing(8, k)
    ring.k.fill_(1e4), ring.v.fill_(1e4)
    ring.fill(k[:, :2], v[:, :2], 0)
    step = (x[:, 2:] for x in (q, k, v))
    out = krause_decode(*step, log_sigma, ring, at(2, q), backend=backend)
    expected = krause_attention(q, k, v, log_sigma, window=8, backend="reference")[:, 2:]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_width_and_one_position_may_stand_for_all(backend: str) -> None:
    q, k, v, log_sigma = inputs(3, 6, 4, 2, 16, backend)
    rings = KeyRing(8, k), KeyRing(8, k)
    for ring in rings:
        ring.fill(k[:, :5], v[:, :5], 0)
    step = [x[:, 5:] for x in (q, k, v)]
    out = krause_decode(*step, log_sigma[1:2], rings[0], at(5, q)[:1].expand(3), top_k=3, backend=backend)
    expected = krause_decode(*step, log_sigma[1:2].repeat(4), rings[1], at(5, q), top_k=3, backend=backend)
    assert torch.equal(out, expected)


def test_float64_and_bfloat16_work_on_the_cpu() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v, log_sigma = (x.to(dtype) for x in inputs(1, 6, 2, 1, 8))
        ring = KeyRing(4, k)
        ring.fill(k[:, :5], v[:, :5], 0)
        out = krause_decode(q[:, 5:], k[:, 5:], v[:, 5:], log_sigma, ring, at(5, q), top_k=2, backend="torch")
        expected = krause_attention(q, k, v, log_sigma, window=4, top_k=2, backend="reference")[:, 5:]
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_operator_keeps_torch_librarys_rules(backend: str) -> None:
    q, k, v, log_sigma = inputs(2, 1, 4, 2, 16, backend)
    ring = KeyRing(8, k)
    arguments = (q, k, v, log_sigma, ring.k, ring.v, ring.half_squares, at(0, q), 3, backend)
    torch.library.opcheck(krause_decode_operator, arguments)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(window=2000, backend="triton"), "takes a ring of at most 1024 keys for 2 query heads each.*'torch'"),
        (dict(backend="fast"), "backend = 'fast'; use one of"),
        (dict(top_k=0), "top_k = 0; it must be at least 1"),
        (dict(heads=3, kv_heads=2), "h a multiple of h_kv"),
        (dict(position=torch.zeros(2, dtype=torch.int32)), r"position is torch.int32 \[2\]; it must be int32 \[1\]"),
        (dict(position=torch.zeros(1, dtype=torch.int64)), "position is torch.int64"),
        (dict(dtype=torch.float64), "torch.float64, the ring torch.float32"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], says: str) -> None:
    settings = (
        dict(window=8, heads=2, kv_heads=1, top_k=3, backend="torch", dtype=torch.float32, position=None) | changes
    )
    q, k, v, log_sigma = inputs(1, 1, settings["heads"], settings["kv_heads"], 8)
    ring, step = KeyRing(settings["window"], k), (x.to(settings["dtype"]) for x in (q, k, v))
    position = at(0, q) if settings["position"] is None else settings["position"]
    with pytest.raises(ValueError, match=says):
        krause_decode(*step, log_sigma, ring, position, top_k=settings["top_k"], backend=settings["backend"])


@pytest.mark.parametrize("ring", [(1, 8), (4, 8), (2, 16)], ids=str)
def test_a_ring_of_other_sequences_or_heads_is_refused(ring: tuple[int, int]) -> None:
    q, k, v, log_sigma = inputs(2, 1, 2, 1, 8)
    b, d = ring
    with pytest.raises(ValueError, match=rf"do not fit a ring of \[{b}, 4, 1, {d}\]"):
        krause_decode(q, k, v, log_sigma, KeyRing(4, k.new_zeros(b, 1, 1, d)), at(0, q))


def test_a_ring_keeps_no_graph() -> None:
    _, k, v, _ = (x.requires_grad_() for x in inputs(1, 6, 2, 1, 8))
    ring = KeyRing(4, k)
    ring.fill(k * 2, v * 2, 0)
    assert not ring.k.requires_grad and not ring.v.requires_grad


def test_it_has_no_gradient() -> None:
    q, k, v, log_sigma = (x.requires_grad_() for x in inputs(1, 1, 2, 1, 8))
    assert not krause_decode(q, k, v, log_sigma, KeyRing(4, k), at(0, q)).requires_grad

"""One new token against the last `window` keys: Krause attention for generation, at a cost that does not grow with the
text. Definition: `ops/krause.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakrause.ops.krause_launch import Launch, decode_refuses
from megakrause.ops.krause_tiles import INTEGERS, LOG2_E, load_keys, load_rows, multiply, select, store_rows


class KeyRing:
    """The last `window` keys, with their |k|^2 / 2, and values of each sequence. Position p lies in slot p % window.

    k and v are [b, window, h_kv, d], of which one head's slots lie one behind the other: what is read together."""

    def __init__(self, window: int, k: Tensor):
        """k: [b, s, h_kv, d], what is to be kept; only its shape, dtype and device count."""
        b, _, h_kv, d = k.shape
        compute = torch.float64 if k.dtype == torch.float64 else torch.float32
        self.window = window
        self.k, self.v = (k.new_zeros(b, h_kv, window, d).transpose(1, 2) for _ in range(2))
        self.half_squares = k.new_zeros(b, h_kv, window, dtype=compute)

    @torch.no_grad()
    def fill(self, k: Tensor, v: Tensor, position: int) -> None:
        """Takes the keys and values [b, s, h_kv, d] of the positions from `position` on."""
        start = max(0, k.shape[1] - self.window)
        k, v = k[:, start:], v[:, start:]
        slots = torch.arange(position + start, position + start + k.shape[1], device=k.device) % self.window
        self.k[:, slots], self.v[:, slots] = k, v
        self.half_squares[:, :, slots] = k.to(self.half_squares.dtype).square().sum(-1).transpose(1, 2) / 2

    def before(self, position: int) -> tuple[Tensor, Tensor]:
        """The keys and values that the query at `position` sees of the positions before it, in order."""
        slots = torch.arange(max(0, position - self.window + 1), position, device=self.k.device) % self.window
        return self.k[:, slots], self.v[:, slots]


def krause_decode(
    q: Tensor,  # [b, 1, h, d]
    k: Tensor,  # [b, 1, h_kv, d]
    v: Tensor,  # [b, 1, h_kv, d]
    log_sigma: Tensor,  # [h] or [1]
    ring: KeyRing,  # takes k and v
    position: Tensor,  # int32 [b]  of the new token in its sequence
    *,
    top_k: int | None = None,
    backend: str = "auto",
) -> Tensor:  # [b, 1, h, d]
    """Krause attention of one new token of each sequence, whose key and value enter the ring. Has no gradient.

    backend: "triton", "torch", or "auto": triton on a CUDA device for what it can take, else torch.

    Raises ValueError for arguments that do not fit together or that the backend cannot take."""
    b, _, h, d = q.shape
    b_ring, window, h_kv, d_ring = ring.k.shape
    fits = (b, d) == (b_ring, d_ring) and k.shape == v.shape == (b, 1, h_kv, d) and log_sigma.shape in ((h,), (1,))
    if q.shape[1] != 1 or not fits or h % h_kv:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, log_sigma {list(log_sigma.shape)}"
        raise ValueError(f"{shapes} do not fit a ring of {list(ring.k.shape)}; one position each, h a multiple of h_kv")
    if len({x.device for x in (q, k, v, log_sigma, ring.k, position)}) > 1:
        raise ValueError(f"q is on {q.device}, the ring on {ring.k.device}; all arguments must be on one device")
    if not q.dtype == k.dtype == v.dtype == ring.k.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, the ring {ring.k.dtype}; they must be the same")
    if position.shape != (b,) or position.dtype != torch.int32:
        raise ValueError(f"position is {position.dtype} {list(position.shape)}; it must be int32 [{b}]")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}; it must be at least 1, or None for no selection")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend = {backend!r}; use one of auto, torch, triton")
    refusal = decode_refuses(q, ring.k, window, top_k)
    if backend == "triton" and refusal is not None:
        raise ValueError(f"backend = 'triton' takes {refusal}; use 'torch' or 'auto'")
    use_triton = backend == "triton" or (backend == "auto" and q.is_cuda and refusal is None)
    if top_k is not None and top_k >= window:
        top_k = None
    backend = "triton" if use_triton else "torch"
    with torch.no_grad():
        return krause_decode_operator(q, k, v, log_sigma, ring.k, ring.v, ring.half_squares, position, top_k, backend)


@torch.library.custom_op("megakrause::krause_decode", mutates_args=("ring_k", "ring_v", "ring_half_squares"))
def krause_decode_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sigma: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_half_squares: Tensor,
    position: Tensor,
    top_k: int | None,
    backend: str,
) -> Tensor:
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        log_sigma, position = log_sigma.expand(q.shape[2]).contiguous(), position.contiguous()
        rings = ring_k, ring_v, ring_half_squares
        if backend == "torch":
            return _decode_torch(q, k, v, log_sigma, *rings, position, top_k)
        launch = Launch.of(q, ring_k, window=ring_k.shape[1], grid=None, top_k=top_k, docs=False, dropout=0.0, seed=0)
        return decode(launch, q.contiguous(), k.contiguous(), v.contiguous(), log_sigma, *rings, position)


@krause_decode_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sigma: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_half_squares: Tensor,
    position: Tensor,
    top_k: int | None,
    backend: str,
) -> Tensor:
    return q.new_empty(q.shape)


def _decode_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sigma: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_half_squares: Tensor,
    position: Tensor,
    top_k: int | None,
) -> Tensor:
    b, window, h_kv, _ = ring_k.shape
    compute = ring_half_squares.dtype
    sequence, slot = torch.arange(b, device=q.device), position.long() % window
    ring_k[sequence, slot], ring_v[sequence, slot] = k[:, 0], v[:, 0]
    ring_half_squares[sequence, :, slot] = k[:, 0].to(compute).square().sum(-1) / 2

    rows = q[:, 0].to(compute).unflatten(1, (h_kv, -1))  # b h_kv g d
    z = rows @ ring_k.to(compute).transpose(1, 2).mT - ring_half_squares[:, :, None]  # b h_kv g window
    empty = torch.arange(window, device=q.device) > position[:, None]
    z = z.masked_fill(empty[:, None, None], -torch.inf)
    if top_k is not None:
        z = z.masked_fill(z < z.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True), -torch.inf)
    inverse_variance = torch.exp(-2 * log_sigma.to(compute)).view(h_kv, -1, 1)
    p = torch.softmax(z * inverse_variance, dim=-1)
    return (p @ ring_v.to(compute).transpose(1, 2)).flatten(1, 2)[:, None].to(q.dtype)


def decode(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sigma: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_half_squares: Tensor,
    position: Tensor,
) -> Tensor:
    out = torch.empty_like(q)
    tiles = launch.decode_tiles()
    constants = {"HEAD_DIM": launch.head_dim, "D": launch.padded_head_dim, "SELECT": launch.top_k is not None}
    constants |= {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "TILES": tiles.tiles}
    tensors = q, k, v, log_sigma, ring_k, ring_v, ring_half_squares, position, out
    sizes = launch.top_k or 0, launch.h, launch.h_kv, launch.s_k
    launch.run(decode_kernel, launch.b * launch.h_kv, (*tensors, *sizes), constants, tiles)
    return out


@triton.jit(do_not_specialize=INTEGERS)
def decode_kernel(
    q, k, v, log_sigma, ring_k, ring_v, ring_half_squares, position, out, top_k, h, h_kv, window,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, SELECT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """All query heads of one kv head of one sequence, against all slots at once."""
    batch, kv = (tl.program_id(0) // h_kv).to(tl.int64), tl.program_id(0) % h_kv
    group = h // h_kv
    row, column, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, D)
    corner = batch * h + kv * group
    rows = load_rows(q + corner * HEAD_DIM, row, row < group, HEAD_DIM, D)
    new = (batch * h_kv + kv) * HEAD_DIM + d
    new_k = tl.load(k + new, mask=d < HEAD_DIM, other=0.0)
    new_v = tl.load(v + new, mask=d < HEAD_DIM, other=0.0)
    new_half_square = tl.sum(new_k.to(tl.float32) * new_k.to(tl.float32), 0) / 2
    i = tl.load(position + batch)
    slot = i % window
    ring_k += (batch * h_kv + kv) * window * HEAD_DIM
    ring_v += (batch * h_kv + kv) * window * HEAD_DIM
    ring_half_squares += (batch * h_kv + kv) * window

    # The new key is put into its slot of the tiles themselves: what was just stored might not be visible to a load.
    tiles = ()
    for t in tl.static_range(TILES):
        at = t * COLUMNS + column
        keys = load_keys(ring_k, i * 0 + t * COLUMNS, column, window, 1, HEAD_DIM, D)
        keys = tl.where((at == slot)[:, None], new_k[None, :], keys)
        half_squares = tl.load(ring_half_squares + at, mask=at < window, other=0.0)
        z = multiply(rows, tl.trans(keys)) - tl.where(at == slot, new_half_square, half_squares)[None, :]
        tiles = tiles + (tl.where((at <= i)[None, :] & (at < window)[None, :], z, float("-inf")),)

    if SELECT:
        whole = (i + 1 >= window) & (window == TILES * COLUMNS)
        cut, _, highest = select(tiles, whole, row * 0 + tl.minimum(i + 1, window), top_k, TILES)
    else:
        cut = tl.full([ROWS], float("-inf"), tl.float32)
        highest = tl.max(tiles[0], 1)
        for t in tl.static_range(1, TILES):
            highest = tl.maximum(highest, tl.max(tiles[t], 1))
    scale = tl.exp(-2 * tl.load(log_sigma + kv * group + row, mask=row < group, other=0.0).to(tl.float32)) * LOG2_E
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, D], tl.float32)
    for t in tl.static_range(TILES):
        p = tl.where(tiles[t] < cut[:, None], 0.0, tl.exp2((tiles[t] - highest[:, None]) * scale[:, None]))
        total += tl.sum(p, 1)
        values = load_keys(ring_v, i * 0 + t * COLUMNS, column, window, 1, HEAD_DIM, D)
        # What lies beyond the ring is its last slot again.
        at = tl.minimum(t * COLUMNS + column, window - 1)
        values = tl.where((at == slot)[:, None], new_v[None, :], values)
        result += multiply(p.to(values.dtype), values)
    store_rows(out + corner * HEAD_DIM, row, result / total[:, None], row < group, HEAD_DIM, D)

    tl.store(ring_k + slot.to(tl.int64) * HEAD_DIM + d, new_k, mask=d < HEAD_DIM)
    tl.store(ring_v + slot.to(tl.int64) * HEAD_DIM + d, new_v, mask=d < HEAD_DIM)
    tl.store(ring_half_squares + slot, new_half_square)

"""Krause attention's forward pass in Triton. Definition: `ops/krause.py`; rows, tiles, selection: `krause_tiles.py`.

`select_and_attend` holds all scores of a block of rows in registers, so that the selection and the softmax work on them
where they are. `attend` serves rows without a selection, of any length, with a running maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakrause.ops.krause_launch import Launch, Tiles
from megakrause.ops.krause_tiles import (
    INTEGERS,
    LOG2_E,
    WINDOW,
    block_of_rows,
    count_not_below,
    dropout_factor,
    first_keys,
    grid_tiles,
    inverse_variances,
    is_seen,
    load_keys,
    load_rows,
    multiply,
    score_tile,
    select,
    store_rows,
    tile_start,
)


def forward(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, log_sigma: Tensor, doc_start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """out [b, s, h, d], and what the backward pass needs: per row [b, s, h] log2 of the sum of the weights, and the z
    that separates the kept keys from the others; and `half_squares` of the keys."""
    out = torch.empty_like(q)
    lse, separator = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    squares = half_squares(launch, k)
    tensors = q, k, v, squares, log_sigma, doc_start, out, lse, separator
    if launch.top_k is None:
        launch.by_rows(attend, launch.attend_tiles(), *tensors)
    else:
        launch.by_rows(select_and_attend, launch.select_tiles(), *tensors, launch.top_k)
    return out, lse, separator, squares


def half_squares(launch: Launch, k: Tensor) -> Tensor | None:
    """|k|^2 / 2, float32 [b, h_kv, s_k]; None for scores that need none."""
    if not launch.bias:
        return None
    b, s_k, h_kv, _ = k.shape
    result = torch.empty(b, h_kv, s_k, dtype=torch.float32, device=k.device)
    constants = {"HEAD_DIM": launch.head_dim, "D": launch.padded_head_dim, "KEYS": 64}
    programs = b * h_kv * triton.cdiv(s_k, 64)
    launch.run(half_squares_kernel, programs, (k, result, s_k, h_kv), constants, Tiles(1, 64))
    return result


@triton.jit(do_not_specialize=INTEGERS)
def half_squares_kernel(k, half_squares, s_k, h_kv, HEAD_DIM: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr):
    blocks = tl.cdiv(s_k, KEYS)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    start, column = tl.program_id(0) % blocks * KEYS, tl.arange(0, KEYS)
    k += (unit // h_kv * s_k * h_kv + unit % h_kv) * HEAD_DIM
    x = load_keys(k, start, column, s_k, h_kv, HEAD_DIM, D).to(tl.float32)
    tl.store(half_squares + unit * s_k + start + column, tl.sum(x * x, 1) / 2, mask=start + column < s_k)


@triton.jit(do_not_specialize=INTEGERS)
def select_and_attend(
    q, k, v, half_squares, log_sigma, doc_start, out, lse, separator, top_k,
    s, s_k, h, h_kv, window, width, radius, seed, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, CLS: tl.constexpr, BIAS: tl.constexpr,
    DOCS: tl.constexpr, DROPOUT: tl.constexpr, PACK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One block of rows and TILES tiles of scores.

    Grid: tile t holds the keys from t * COLUMNS on. Window: tile 0 ends with the block's last position, the others lie
    before it; a column of tile 0 that lies ahead of a row's own position holds, for this row, the key TILES * COLUMNS
    before it instead. So the tiles hold every key of each row's window once, and none of their columns is wasted."""
    batch, start, head, corner = block_of_rows(s, h, ROWS, PACK)
    slot, lane = tl.arange(0, ROWS) // PACK, tl.arange(0, ROWS) % PACK
    offset, exists = slot * h + lane, start + slot < s
    i = start + slot + (s_k - s)
    first = first_keys(doc_start, batch, start + slot, s, s_k, window, KIND, DOCS)
    kv = head // (h // h_kv)
    k += (batch * s_k * h_kv + kv) * HEAD_DIM
    v += (batch * s_k * h_kv + kv) * HEAD_DIM
    if BIAS:
        half_squares += (batch * h_kv + kv) * s_k
    rows = load_rows(q + corner * HEAD_DIM, offset, exists, HEAD_DIM, D)
    column = tl.arange(0, COLUMNS)
    newest = start + ROWS // PACK + (s_k - s) - COLUMNS if KIND == WINDOW else start * 0  # where tile 0 starts
    STEP: tl.constexpr = -COLUMNS if KIND == WINDOW else COLUMNS  # from a tile to the next
    old = newest + TILES * STEP
    # A column of tile 0 that lies ahead of a row's own position, both counted from the block's start.
    ahead = (column - (COLUMNS - ROWS // PACK))[None, :] > slot[:, None]
    whole = False  # all rows see all keys of the tiles
    if KIND == WINDOW:
        oldest = start + (s_k - s) - window + 1
        whole = (window == TILES * COLUMNS) & (oldest >= 0) & (start + ROWS // PACK <= s)
        if DOCS:
            whole = whole & (tl.max(first - slot, 0) <= oldest)
    tiles = ()
    for t in tl.static_range(TILES):
        begin = newest + t * STEP
        z = score_tile(rows, k, half_squares, begin, column, s_k, h_kv, HEAD_DIM, D, BIAS)
        if KIND == WINDOW:
            j = begin + column[None, :]
            if t == 0:
                z = tl.where(ahead, score_tile(rows, k, half_squares, old, column, s_k, h_kv, HEAD_DIM, D, BIAS), z)
                j = tl.where(ahead, old, newest) + column[None, :]
            if not whole:
                z = tl.where(j >= first[:, None], z, float("-inf"))
        else:
            j = begin + column
            seen = is_seen(i[:, None], j[None, :], first[:, None], s_k, width, radius, KIND, CLS)
            z = tl.where(seen, z, float("-inf"))
        tiles = tiles + (z,)

    if KIND == WINDOW:
        num_seen = tl.maximum(i + 1 - first, 0)
    else:
        num_seen = count_not_below(tiles, tl.full([ROWS], -3.0e38, tl.float32), TILES).to(tl.int32)
    cut, between, highest = select(tiles, whole, num_seen, top_k, TILES)
    highest = tl.where(num_seen > 0, highest, 0.0)
    scale = inverse_variances(log_sigma, head, lane, ROWS, PACK) * LOG2_E
    total = tl.zeros([ROWS], tl.float32)
    weights = ()
    for t in tl.static_range(TILES):
        # So written, a score that is not a number is kept, and seen in the result.
        p = tl.where(tiles[t] < cut[:, None], 0.0, tl.exp2((tiles[t] - highest[:, None]) * scale[:, None]))
        total += tl.sum(p, 1)
        if DROPOUT:
            j = newest + t * STEP + column[None, :]
            if KIND == WINDOW and t == 0:
                j = tl.where(ahead, old, newest) + column[None, :]
            p *= dropout_factor(
                seed, dropout_threshold, dropout_scale, (batch * h + head + lane)[:, None], i[:, None], j
            )
        if KIND == WINDOW and t == 0:
            old_weights = tl.where(ahead, p, 0.0).to(v.dtype.element_ty)
            p = tl.where(ahead, 0.0, p)
        weights = weights + (p.to(v.dtype.element_ty),)
    # Infinite for a row that keeps nothing. Stored before values are loaded, or the compiler would hold all weights
    # until the end, in float32, for their sum.
    log_total = tl.where(total > 0, highest * scale + tl.log2(total), float("inf"))
    tl.store(lse + corner + offset, log_total, mask=exists)
    tl.store(separator + corner + offset, between, mask=exists)
    inverse_total = 1 / tl.where(total > 0, total, 1.0)

    result = tl.zeros([ROWS, D], tl.float32)
    if KIND == WINDOW:
        result += multiply(old_weights, load_keys(v, old, column, s_k, h_kv, HEAD_DIM, D))
    for t in tl.static_range(TILES):
        result += multiply(weights[t], load_keys(v, newest + t * STEP, column, s_k, h_kv, HEAD_DIM, D))
    store_rows(out + corner * HEAD_DIM, offset, result * inverse_total[:, None], exists, HEAD_DIM, D)


@triton.jit(do_not_specialize=INTEGERS)
def attend(
    q, k, v, half_squares, log_sigma, doc_start, out, lse, separator,
    s, s_k, h, h_kv, window, width, radius, seed, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, CLS: tl.constexpr, BIAS: tl.constexpr,
    DOCS: tl.constexpr, DROPOUT: tl.constexpr, PACK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of rows without a selection, tile by tile."""
    batch, start, head, corner = block_of_rows(s, h, ROWS, PACK)
    slot, lane = tl.arange(0, ROWS) // PACK, tl.arange(0, ROWS) % PACK
    offset, exists = slot * h + lane, start + slot < s
    i = start + slot + (s_k - s)
    first = first_keys(doc_start, batch, start + slot, s, s_k, window, KIND, DOCS)
    kv = head // (h // h_kv)
    k += (batch * s_k * h_kv + kv) * HEAD_DIM
    v += (batch * s_k * h_kv + kv) * HEAD_DIM
    if BIAS:
        half_squares += (batch * h_kv + kv) * s_k
    rows = load_rows(q + corner * HEAD_DIM, offset, exists, HEAD_DIM, D)
    scale = inverse_variances(log_sigma, head, lane, ROWS, PACK) * LOG2_E

    column = tl.arange(0, COLUMNS)
    if KIND == WINDOW:
        tiles_from = tl.min(first, 0)
        tiles = tl.cdiv(tl.maximum(tl.minimum(tl.max(i, 0) + 1, s_k) - tiles_from, 0), COLUMNS)
    else:
        tiles_from, tiles = grid_tiles(start, start + ROWS // PACK - 1, s_k, width, radius, COLUMNS, CLS)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, D], tl.float32)
    for t in range(tiles):
        tile = tile_start(tiles_from, t, COLUMNS, CLS)
        j = tile + column
        z = score_tile(rows, k, half_squares, tile, column, s_k, h_kv, HEAD_DIM, D, BIAS)
        seen = is_seen(i[:, None], j[None, :], first[:, None], s_k, width, radius, KIND, CLS)
        z = tl.where(seen, z, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(z, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        p = tl.exp2((z - base[:, None]) * scale[:, None])
        shrink = tl.exp2((highest - base) * scale)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p *= dropout_factor(
                seed, dropout_threshold, dropout_scale, (batch * h + head + lane)[:, None], i[:, None], j[None, :]
            )
        values = load_keys(v, tile, column, s_k, h_kv, HEAD_DIM, D)
        result = result * shrink[:, None] + multiply(p.to(values.dtype), values)
        highest = new_highest

    result = result / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out + corner * HEAD_DIM, offset, result, exists, HEAD_DIM, D)
    tl.store(lse + corner + offset, tl.where(total > 0, highest * scale + tl.log2(total), float("inf")), mask=exists)
    tl.store(separator + corner + offset, tl.full([ROWS], float("-inf"), tl.float32), mask=exists)

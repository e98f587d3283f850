"""Krause attention's backward pass in Triton: two kernels without atomics, so that results are the same in every run.

With dS_ij = p_ij (dO_i . v_j - D_i) and D_i = dO_i . O_i, over the kept keys:

    dq_i = sigma^-2 sum_j dS_ij k_j          dlog_sigma = -2 sum_ij dS_ij log p_ij
    dv_j = sum_i p_ij dO_i                   dk_j = sigma^-2 (sum_i dS_ij q_i - k_j sum_i dS_ij)

p is computed again from each row's saved sum and separator. (dlog_sigma = -2 sum dS z / sigma^2, and the dS of a row
sum to zero: log p = z / sigma^2 - lse may stand for z / sigma^2, and is small where z is not.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakrause.ops.krause_launch import Launch
from megakrause.ops.krause_tiles import (
    INTEGERS,
    LOG2_E,
    WINDOW,
    block_of_rows,
    dropout_factor,
    first_keys,
    grid_tiles,
    inverse_variances,
    is_seen,
    load_keys,
    load_rows,
    multiply,
    score_tile,
    store_rows,
    tile_start,
)


def backward(
    launch: Launch,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sigma: Tensor,
    doc_start: Tensor | None,
    out: Tensor,
    lse: Tensor,
    separator: Tensor,
    squares: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the sum over a row [b, s, h] of dlog_sigma. The other arguments: as `forward` took and gave."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta, dlog_sigma = torch.empty_like(lse), torch.empty_like(lse)
    shared = q, k, v, squares, log_sigma, doc_start
    launch.by_rows(grad_queries, launch.grad_queries_tiles(), *shared, out, lse, separator, grad, dq, delta, dlog_sigma)
    launch.by_keys(grad_keys, launch.grad_keys_tiles(), *shared, lse, separator, grad, delta, dk, dv)
    return dq, dk, dv, dlog_sigma


@triton.jit(do_not_specialize=INTEGERS)
def grad_queries(
    q, k, v, half_squares, log_sigma, doc_start, out, lse, separator, grad, dq, delta, dlog_sigma,
    s, s_k, h, h_kv, window, width, radius, seed, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, CLS: tl.constexpr, BIAS: tl.constexpr,
    DOCS: tl.constexpr, DROPOUT: tl.constexpr, PACK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq, D and dlog_sigma of one block of rows."""
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
    row_grad = load_rows(grad + corner * HEAD_DIM, offset, exists, HEAD_DIM, D)
    row_out = load_rows(out + corner * HEAD_DIM, offset, exists, HEAD_DIM, D)
    row_delta = tl.sum(row_grad.to(tl.float32) * row_out.to(tl.float32), 1)
    tl.store(delta + corner + offset, row_delta, mask=exists)
    inverse_variance = inverse_variances(log_sigma, head, lane, ROWS, PACK)
    row_lse = tl.load(lse + corner + offset, mask=exists, other=0.0)
    row_lse = tl.where(row_lse < float("inf"), row_lse, 0.0)  # a row that keeps nothing: not 0 * inf below
    bound = tl.load(separator + corner + offset, mask=exists, other=0.0)

    column = tl.arange(0, COLUMNS)
    if KIND == WINDOW:
        tiles_from = tl.min(first, 0)
        tiles = tl.cdiv(tl.maximum(tl.minimum(tl.max(i, 0) + 1, s_k) - tiles_from, 0), COLUMNS)
    else:
        tiles_from, tiles = grid_tiles(start, start + ROWS // PACK - 1, s_k, width, radius, COLUMNS, CLS)
    result = tl.zeros([ROWS, D], tl.float32)
    row_dlog_sigma = tl.zeros([ROWS], tl.float32)
    for t in range(tiles):
        tile = tile_start(tiles_from, t, COLUMNS, CLS)
        j = tile + column
        z = score_tile(rows, k, half_squares, tile, column, s_k, h_kv, HEAD_DIM, D, BIAS)
        kept = is_seen(i[:, None], j[None, :], first[:, None], s_k, width, radius, KIND, CLS) & (z >= bound[:, None])
        log_p = z * (inverse_variance * LOG2_E)[:, None] - row_lse[:, None]
        p = tl.where(kept, tl.exp2(log_p), 0.0)
        dp = multiply(row_grad, tl.trans(load_keys(v, tile, column, s_k, h_kv, HEAD_DIM, D)))
        if DROPOUT:
            dp *= dropout_factor(
                seed, dropout_threshold, dropout_scale, (batch * h + head + lane)[:, None], i[:, None], j[None, :]
            )
        ds = p * (dp - row_delta[:, None])
        row_dlog_sigma += tl.sum(ds * log_p, 1)
        keys = load_keys(k, tile, column, s_k, h_kv, HEAD_DIM, D)
        result += multiply(ds.to(keys.dtype), keys)
    store_rows(dq + corner * HEAD_DIM, offset, result * inverse_variance[:, None], exists, HEAD_DIM, D)
    tl.store(dlog_sigma + corner + offset, row_dlog_sigma * (-2 / LOG2_E), mask=exists)


@triton.jit(do_not_specialize=INTEGERS)
def grad_keys(
    q, k, v, half_squares, log_sigma, doc_start, lse, separator, grad, delta, dk, dv,
    s, s_k, h, h_kv, window, width, radius, seed, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, CLS: tl.constexpr, BIAS: tl.constexpr,
    DOCS: tl.constexpr, DROPOUT: tl.constexpr, PACK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one kv head, summed over the heads that share it. Tiles are [c, r]."""
    blocks = tl.cdiv(s_k, COLUMNS)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    batch, kv = unit // h_kv, (unit % h_kv).to(tl.int32)
    block = tl.program_id(0) % blocks * COLUMNS
    column = tl.arange(0, COLUMNS)
    j, in_keys = block + column, block + column < s_k
    corner = (batch * s_k + block) * h_kv + kv
    keys = load_rows(k + corner * HEAD_DIM, column * h_kv, in_keys, HEAD_DIM, D)
    values = load_rows(v + corner * HEAD_DIM, column * h_kv, in_keys, HEAD_DIM, D)
    if BIAS:
        bias = tl.load(half_squares + (batch * h_kv + kv) * s_k + j, mask=in_keys, other=0.0)

    POSITIONS: tl.constexpr = ROWS // PACK
    slot, lane = tl.arange(0, ROWS) // PACK, tl.arange(0, ROWS) % PACK
    if KIND == WINDOW:  # queries from the first key's own position to the last one whose window reaches the last key
        blocks_from = tl.maximum(block - (s_k - s), 0)
        blocks_to = tl.minimum(block + COLUMNS - 1 + window - (s_k - s), s)
        if DOCS:  # and to the last one whose document begins before the last key
            last = blocks_from
            for part in range(blocks_from, blocks_to, 1024):
                position = part + tl.arange(0, 1024)
                begins = tl.load(doc_start + batch * s + position, mask=position < blocks_to, other=2**30)
                last = tl.maximum(last, tl.max(tl.where(begins < block + COLUMNS, position + 1, 0), 0))
            blocks_to = last
        num_blocks = tl.cdiv(tl.maximum(blocks_to - blocks_from, 0), POSITIONS)
    else:
        blocks_from, num_blocks = grid_tiles(block, block + COLUMNS - 1, s, width, radius, POSITIONS, CLS)
    packs = h // h_kv // PACK
    dk_sum = tl.zeros([COLUMNS, D], tl.float32)
    dv_sum = tl.zeros([COLUMNS, D], tl.float32)
    ds_sum = tl.zeros([COLUMNS], tl.float32)
    for step in range(packs * num_blocks):
        start = tile_start(blocks_from, step % num_blocks, POSITIONS, CLS)
        head = (kv * packs + step // num_blocks) * PACK
        corner_q = (batch * s + start) * h + head
        # What would lie beyond the last row is the last again, and sees nothing: see `first_keys`.
        offset = tl.minimum(slot, s - 1 - start) * h + lane
        i = start + slot + (s_k - s)
        first = first_keys(doc_start, batch, start + slot, s, s_k, window, KIND, DOCS)
        rows = load_rows(q + corner_q * HEAD_DIM, offset, None, HEAD_DIM, D)
        row_grad = load_rows(grad + corner_q * HEAD_DIM, offset, None, HEAD_DIM, D)
        row_lse = tl.load(lse + corner_q + offset)
        bound = tl.load(separator + corner_q + offset)
        row_delta = tl.load(delta + corner_q + offset)
        inverse_variance = inverse_variances(log_sigma, head, lane, ROWS, PACK)

        z = multiply(keys, tl.trans(rows))
        if BIAS:
            z -= bias[:, None]
        kept = is_seen(i[None, :], j[:, None], first[None, :], s_k, width, radius, KIND, CLS) & (z >= bound[None, :])
        p = tl.where(kept, tl.exp2(z * (inverse_variance * LOG2_E)[None, :] - row_lse[None, :]), 0.0)
        if DROPOUT:
            factor = dropout_factor(
                seed, dropout_threshold, dropout_scale, (batch * h + head + lane)[None, :], i[None, :], j[:, None]
            )
            dv_sum += multiply((p * factor).to(row_grad.dtype), row_grad)
            ds = p * (multiply(values, tl.trans(row_grad)) * factor - row_delta[None, :])
        else:
            dv_sum += multiply(p.to(row_grad.dtype), row_grad)
            less = tl.broadcast_to(-row_delta[None, :], [COLUMNS, ROWS])
            ds = p * multiply(values, tl.trans(row_grad), less)
        ds *= inverse_variance[None, :]
        dk_sum += multiply(ds.to(rows.dtype), rows)
        if BIAS:
            ds_sum += tl.sum(ds, 1)
    if BIAS:
        dk_sum -= keys.to(tl.float32) * ds_sum[:, None]
    store_rows(dk + corner * HEAD_DIM, column * h_kv, dk_sum, in_keys, HEAD_DIM, D)
    store_rows(dv + corner * HEAD_DIM, column * h_kv, dv_sum, in_keys, HEAD_DIM, D)

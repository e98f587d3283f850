"""Krause attention over a window in plain PyTorch, time and memory linear in the sequence length: for CPUs, and the
fallback elsewhere. Definition: `ops/krause.py`.

Positions are cut into blocks of C. Block n of queries meets the keys of blocks n - P/C .. n, where P is window - 1
rounded up to whole blocks: one batched matrix product over an overlapping view of the keys, no copy. All sequences and
heads lie one behind the other in that view, so the first blocks of one meet the last keys of another until masked.

Queries carry an extra 1 and keys an extra -|k|^2 / 2, so that z is one product, and the products of the backward pass
also yield the row and column sums of dS that the gradients of k and log_sigma need. The backward pass recomputes z by
the forward's own operations on the forward's own shapes: the same bits, so the saved k-th largest z separates the same
keys.

Shapes: u = b * h_kv * blocks units; C positions; r = g * C rows, g the query heads that share a kv head;
span = P + C keys; d head size; e = d + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megakrause.ops.dropout import keep_mask

SCORES_AT_ONCE = 2**19  # elements of z that are worked on together: a few MiB, so that they stay in cache


def krause_blocked(
    q: Tensor,  # [b, s, h, d]
    k: Tensor,  # [b, s_k, h_kv, d]  s_k <= s + window - 1
    v: Tensor,  # [b, s_k, h_kv, d]
    log_sigma: Tensor,  # [h] or [1]
    *,
    window: int,
    top_k: int | None,
    doc_start: Tensor | None,
    dropout: float,
    seed: int | None,
) -> Tensor:  # [b, s, h, d]
    return _KrauseBlocked.apply(q, k, v, log_sigma, window, top_k, doc_start, dropout, seed)


class _KrauseBlocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_sigma: Tensor,
        window: int,
        top_k: int | None,
        doc_start: Tensor | None,
        dropout: float,
        seed: int | None,
    ) -> Tensor:
        work = _Work(q, k, v, log_sigma, window, top_k, doc_start, dropout, seed)
        out = torch.empty_like(work.q[..., :-1])  # u r d
        cut = None if work.top_k is None else torch.empty_like(out[..., :1])  # the k-th largest z of each row
        for part in work.parts():
            z = work.scores(part)
            if cut is not None:
                cut[part] = z.topk(work.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
            p = work.weights(z, cut, part)
            if dropout > 0:
                p *= work.kept(part)
            torch.bmm(p, work.v[part], out=out[part])
        ctx.save_for_backward(q, k, v, log_sigma, doc_start, out, cut)
        ctx.options = (window, top_k, dropout, seed)
        return work.positions_of_rows(out).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_sigma, doc_start, out, cut = ctx.saved_tensors
        window, top_k, dropout, seed = ctx.options
        work = _Work(q, k, v, log_sigma, window, top_k, doc_start, dropout, seed)
        do = work.rows(grad)  # u r d
        delta = (do * out).sum(-1, keepdim=True)  # D_i = dO_i . O_i
        dq = torch.empty_like(work.q)
        dk, dv = work.zero_keys(work.k), work.zero_keys(work.v)
        for part in work.parts():
            p = work.weights(work.scores(part), cut, part)
            ds = torch.bmm(do[part], work.v[part].mT)  # u r span
            if dropout > 0:
                kept = work.kept(part)
                ds *= kept
                work.add_to_keys(dv, part, p * kept, do[part])
            else:
                work.add_to_keys(dv, part, p, do[part])
            ds -= delta[part]
            ds *= p
            ds *= work.inverse_variance(part)
            torch.bmm(ds, work.k[part], out=dq[part])
            work.add_to_keys(dk, part, ds, work.q[part])

        # z = q.k - |k|^2/2, hence dk_j = sum_i dS_ij q_i - k_j sum_i dS_ij, and the sum of dS z over a row is q'.dq'.
        row_sums = work.positions_of_rows((work.q * dq).sum(-1, keepdim=True))  # b s h 1
        dlog_sigma = -2 * row_sums.sum((0, 1))[:, 0]  # h
        if log_sigma.shape[0] == 1:
            dlog_sigma = dlog_sigma.sum(0, keepdim=True)
        dk = work.positions_of_keys(dk)  # b s_k h_kv e
        dk = dk[..., :-1] - dk[..., -1:] * k
        dq = work.positions_of_rows(dq[..., :-1])
        dv = work.positions_of_keys(dv)
        gradients = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dlog_sigma.to(log_sigma.dtype)
        return *gradients, None, None, None, None, None


class _Work:
    """The arguments laid out in units, and the steps that both passes share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_sigma: Tensor,
        window: int,
        top_k: int | None,
        doc_start: Tensor | None,
        dropout: float,
        seed: int | None,
    ):
        self.b, self.s, self.h, _ = q.shape
        self.s_k, self.h_kv = k.shape[1:3]
        self.group = self.h // self.h_kv
        self.block = min(max(window // 4, 16), 64)  # C: larger blocks multiply faster and waste more of each span
        self.reach = -(-(window - 1) // self.block) * self.block  # P
        self.span = self.reach + self.block
        self.blocks = -(-self.s_k // self.block)
        self.units = self.b * self.h_kv * self.blocks
        self.compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.top_k = None if top_k is None or top_k >= window else top_k
        self.dropout, self.seed = dropout, seed

        self.q = self.rows(F.pad(q.to(self.compute), (0, 1), value=1.0))  # u r e
        kc = k.to(self.compute)
        self.k = self._spans(torch.cat([kc, kc.square().sum(-1, keepdim=True) / -2], dim=-1))  # u span e
        self.v = self._spans(v.to(self.compute))  # u span d

        inverse = torch.exp(-2 * log_sigma.to(self.compute)).expand(self.h)
        inverse = inverse.view(self.h_kv, 1, self.group, 1).expand(-1, self.blocks, -1, self.block)
        self._inverse_variance = inverse.expand(self.b, -1, -1, -1, -1).reshape(self.units, -1, 1)  # u r 1
        self._mask(window, doc_start, q.device)

    def _mask(self, window: int, doc_start: Tensor | None, device: torch.device) -> None:
        """What each row sees: the band of the window in every unit, and a later first key in some of them."""
        row = torch.arange(self.block, device=device)[:, None]
        column = torch.arange(self.span, device=device) - self.reach  # key - first position of the block
        band = (column <= row) & (column > row - window)  # C span
        self._column = column
        self._band = torch.zeros(band.shape, dtype=self.compute, device=device).masked_fill(~band, -torch.inf)

        position = torch.arange(self.blocks * self.block, device=device)
        first = torch.zeros(self.b, self.blocks * self.block, dtype=torch.int64, device=device)
        if doc_start is not None:
            offset = self.s_k - self.s
            first[:, offset : offset + self.s] = doc_start.clamp(min=0)
        cut_short = (first > position - window + 1).view(self.b, self.blocks, self.block).any(-1)  # b blocks
        self._cut_short = cut_short[:, None].expand(-1, self.h_kv, -1).reshape(-1)  # u
        first = first - position.view(self.blocks, self.block)[:, :1].expand(-1, self.block).reshape(-1)
        first = first.view(self.b, 1, self.blocks, self.block).expand(-1, self.h_kv, -1, -1)
        self._first = first.reshape(self.units, self.block, 1)  # u C 1, relative to the block as _column is
        empty = self._first > torch.arange(self.block, device=device)[:, None]
        self._empty = empty.repeat(1, self.group, 1) if bool(empty.any()) else None  # u r 1

    def parts(self) -> Iterator[slice]:
        """Slices of units that are worked on together."""
        step = max(1, SCORES_AT_ONCE // (self.group * self.block * self.span))
        for start in range(0, self.units, step):
            yield slice(start, min(start + step, self.units))

    def scores(self, part: slice) -> Tensor:
        """z, [u, r, span]; -inf where the key is not seen."""
        z = torch.bmm(self.q[part], self.k[part].mT)
        by_head = z.view(-1, self.group, self.block, self.span)
        by_head += self._band
        short = self._cut_short[part].nonzero()[:, 0]
        if len(short):
            hidden = self._column < self._first[part][short]  # u C span
            by_head[short] = by_head[short].masked_fill_(hidden[:, None], -torch.inf)
        return z

    def weights(self, z: Tensor, cut: Tensor | None, part: slice) -> Tensor:
        """p, [u, r, span]: softmax of z / sigma^2 over the kept keys. Works in the memory of z."""
        if cut is not None:
            z = torch.where(z >= cut[part], z, -torch.inf)
        z *= self.inverse_variance(part)
        p = torch.softmax(z, dim=-1)
        return p if self._empty is None else p.masked_fill_(self._empty[part], 0)

    def inverse_variance(self, part: slice) -> Tensor:
        """1 / sigma^2 of each row, [u, r, 1]."""
        return self._inverse_variance[part]

    def kept(self, part: slice) -> Tensor:
        """What dropout multiplies p with, [u, r, span]: 0 or 1 / (1 - dropout)."""
        assert self.seed is not None
        unit = torch.arange(part.start, part.stop, device=self.q.device)[:, None, None, None]
        first = unit % self.blocks * self.block
        head = unit // self.blocks * self.group + torch.arange(self.group, device=unit.device)[:, None, None]
        row = torch.arange(self.block, device=unit.device)[:, None]
        mask = keep_mask(self.seed, head, first + row, first + self._column, self.dropout)
        return mask.view(part.stop - part.start, -1, self.span).to(self.compute) / (1 - self.dropout)

    def add_to_keys(self, total: Tensor, part: slice, weights: Tensor, rows: Tensor) -> None:
        """total[keys of the unit] += weights^T rows, for every unit of the part. total: as `zero_keys`."""
        for i in range(self.span // self.block):
            columns = weights[..., i * self.block : (i + 1) * self.block]
            total[part.start + i : part.stop + i].baddbmm_(columns.mT, rows)

    def zero_keys(self, like: Tensor) -> Tensor:
        """Zeros for one vector a key, [reach / C + u, C, d], in the order of the spans."""
        return like.new_zeros(self.reach // self.block + self.units, self.block, like.shape[-1])

    def rows(self, x: Tensor) -> Tensor:
        """[b, s, h, d] -> [u, r, d]; queries stand at the last s of the s_k key positions."""
        x = F.pad(x.to(self.compute), (0, 0, 0, 0, self.s_k - self.s, self.blocks * self.block - self.s_k))
        x = x.view(self.b, self.blocks, self.block, self.h_kv, self.group, -1).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(self.units, self.group * self.block, -1)

    def positions_of_rows(self, x: Tensor) -> Tensor:
        """[u, r, d] -> [b, s, h, d]."""
        x = x.view(self.b, self.h_kv, self.blocks, self.group, self.block, -1).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(self.b, self.blocks * self.block, self.h, -1)[:, self.s_k - self.s : self.s_k]

    def positions_of_keys(self, x: Tensor) -> Tensor:
        """[reach / C + u, C, d] -> [b, s_k, h_kv, d]."""
        x = x[self.reach // self.block :].view(self.b, self.h_kv, self.blocks * self.block, -1)
        return x.transpose(1, 2)[:, : self.s_k]

    def _spans(self, x: Tensor) -> Tensor:
        """[b, s_k, h_kv, d] -> the overlapping view [u, span, d] of the keys that each unit meets."""
        x = F.pad(x, (0, 0, 0, 0, 0, self.blocks * self.block - self.s_k)).transpose(1, 2)
        d = x.shape[-1]
        flat = F.pad(x.reshape(-1, d), (0, 0, self.reach, 0))
        return flat.as_strided((self.units, self.span, d), (self.block * d, d, 1))

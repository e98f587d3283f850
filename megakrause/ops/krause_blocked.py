"""Krause attention over a window in plain PyTorch, time and memory linear in the sequence length: for CPUs, and the
fallback elsewhere. Definition: `ops/krause.py`.

Positions are cut into blocks of C. Block n of queries meets the keys of blocks n - P/C .. n, where P is window - 1
rounded up to whole blocks: one batched matrix product over an overlapping view of the keys, no copy. All sequences and
heads lie one behind the other in that view, so the first blocks of one meet the last keys of another before these are
masked: a value that is not finite can reach its neighbour, any other cannot.

Queries carry an extra 1 and keys an extra -|k|^2 / 2, so that z is one product, and the products of the backward pass
also yield the row and column sums of dS that the gradients of k and log_sigma need. The backward pass recomputes z by
the forward's own operations on the forward's own shapes: the same bits, so the saved k-th largest z separates the same
keys.

Shapes: u = b * h_kv * blocks units; C positions; r = g * C rows, g the query heads that share a kv head;
span = P + C keys; d head size; e = d + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megakrause.ops.dropout import keep_mask

SCORES_AT_ONCE = 2**19  # elements of z that are worked on together: a few MiB, so that they stay in cache


def blocked_forward(
    q: Tensor,  # [b, s, h, d]
    k: Tensor,  # [b, s_k, h_kv, d]  s_k <= s + window - 1
    v: Tensor,  # [b, s_k, h_kv, d]
    log_sigma: Tensor,  # [h] or [1]
    *,
    window: int,
    top_k: int | None,
    doc_start: Tensor | None,
    dropout: float,
    seed: int,
    bias: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """out [b, s, h, d], and what `blocked_backward` needs: q, k and v laid out in units, and the k-th largest z of each
    row, [u, r, 1], than which what is kept is not smaller; empty if all is kept."""
    units = _Units(q.shape, k.shape, window, q)
    qu, ku, vu = units.augmented_rows(q), units.augmented_keys(k, bias), units.keys(v)
    scores = _Scores(units, window, doc_start, log_sigma, dropout, seed)
    out = torch.empty_like(qu[..., :-1])  # u r d
    cut = None if top_k is None or top_k >= window else torch.empty_like(out[..., :1])
    for part in units.parts():
        z = scores.of(qu, ku, part)
        if cut is not None and top_k is not None:
            cut[part] = z.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        p = scores.weights(z, cut, part)
        if dropout > 0:
            p *= scores.kept(part)
        torch.bmm(p, units.spans(vu)[part], out=out[part])
    out = units.positions_of_rows(out).to(q.dtype).contiguous()
    return out, (qu, ku, vu, qu.new_empty(0) if cut is None else cut)


def blocked_saved(q: Tensor, k: Tensor, window: int, top_k: int | None) -> tuple[Tensor, ...]:
    """Uninitialized tensors like those that `blocked_forward` leaves for `blocked_backward`."""
    units = _Units(q.shape, k.shape, window, q)
    d, rows = q.shape[-1], units.group * units.block
    keys = units.reach // units.block + units.count, units.block
    cut = (0,) if top_k is None or top_k >= window else (units.count, rows, 1)
    shapes = (units.count, rows, d + 1), (*keys, d + 1), (*keys, d), cut
    return tuple(q.new_empty(shape, dtype=units.compute) for shape in shapes)


def blocked_backward(
    grad: Tensor,  # [b, s, h, d]
    saved: Sequence[Tensor],
    log_sigma: Tensor,
    *,
    keys: Sequence[int],  # shape of k and v
    window: int,
    doc_start: Tensor | None,
    dropout: float,
    seed: int,
    bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and the sum over a row [b, s, h] of log_sigma's. The other arguments: as `blocked_forward`
    took and gave."""
    qu, ku, vu, saved_cut = saved
    cut = saved_cut if saved_cut.numel() else None
    units = _Units(grad.shape, keys, window, grad)
    scores = _Scores(units, window, doc_start, log_sigma, dropout, seed)
    do = units.rows(grad.to(units.compute))  # u r d
    scaled_qu = qu * scores.inverse_variance
    dq, dk, dv = torch.empty_like(qu), torch.zeros_like(ku), torch.zeros_like(vu)
    for part in units.parts():
        p = scores.weights(scores.of(qu, ku, part), cut, part)
        ds = torch.bmm(do[part], units.spans(vu)[part].mT)  # u r span
        if dropout > 0:
            kept = scores.kept(part)
            ds *= kept
            units.add_to_keys(dv, part, p * kept, do[part])
        else:
            units.add_to_keys(dv, part, p, do[part])
        ds *= p
        ds -= p.mul_(ds.sum(-1, keepdim=True))  # the sum is D_i = dO_i . O_i, of an O that was not rounded
        torch.bmm(ds, units.spans(ku)[part], out=dq[part])
        units.add_to_keys(dk, part, ds, scaled_qu[part])
    dq *= scores.inverse_variance

    # z = q.k - |k|^2/2, hence dk_j = sum_i dS_ij q_i - k_j sum_i dS_ij, and the sum of dS z over a row is q'.dq'.
    dlog_sigma = -2 * units.positions_of_rows((qu * dq).sum(-1, keepdim=True))[..., 0]
    grad_k = grad.new_empty(tuple(keys), dtype=units.compute)
    dk, ku = units.positions_of_keys(dk), units.positions_of_keys(ku)
    torch.addcmul(dk[..., :-1], dk[..., -1:], ku[..., :-1], value=-1 if bias else 0, out=grad_k)
    return (
        units.positions_of_rows(dq[..., :-1]).to(grad.dtype).contiguous(),
        grad_k.to(grad.dtype),
        units.positions_of_keys(dv).to(grad.dtype).contiguous(),
        dlog_sigma,
    )


class _Units:
    """How positions are cut into units, and tensors laid out in them and back."""

    def __init__(self, queries: Sequence[int], keys: Sequence[int], window: int, like: Tensor):
        self.b, self.s, self.h, _ = queries
        self.s_k, self.h_kv = keys[1:3]
        self.group = self.h // self.h_kv
        self.block = min(max(window // 4, 16), 64)  # C: larger blocks multiply faster and waste more of each span
        self.reach = -(-(window - 1) // self.block) * self.block  # P
        self.span = self.reach + self.block
        self.blocks = -(-self.s_k // self.block)
        self.count = self.b * self.h_kv * self.blocks
        self.compute = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.device = like.device

    def parts(self) -> Iterator[slice]:
        """Slices of units that are worked on together."""
        step = max(1, SCORES_AT_ONCE // (self.group * self.block * self.span))
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    def augmented_rows(self, q: Tensor) -> Tensor:
        """[b, s, h, d] -> [u, r, e]: q' = [q, 1]."""
        by_block = self._by_block(q)
        rows = q.new_empty((*by_block.shape[:-1], q.shape[-1] + 1), dtype=self.compute)
        rows[..., :-1], rows[..., -1] = by_block, 1
        return rows.view(self.count, self.group * self.block, -1)

    def augmented_keys(self, k: Tensor, bias: bool) -> Tensor:
        """[b, s_k, h_kv, d] -> [reach / C + u, C, e]: k' = [k, -|k|^2 / 2], or [k, 0] without the bias."""
        result = k.new_zeros((self.reach + self.count * self.block, k.shape[-1] + 1), dtype=self.compute)
        keys = self._by_head(result)
        keys[..., :-1] = k.transpose(1, 2)
        if bias:
            keys[..., -1] = keys[..., :-1].square().sum(-1).mul_(-0.5)
        return result.view(-1, self.block, k.shape[-1] + 1)

    def rows(self, x: Tensor) -> Tensor:
        """[b, s, h, d] -> [u, r, d]."""
        return self._by_block(x).reshape(self.count, self.group * self.block, -1)

    def _by_block(self, x: Tensor) -> Tensor:
        """[b, s, h, d] -> [b, h_kv, blocks, g, C, d]; queries stand at the last s of the s_k key positions."""
        x = F.pad(x, (0, 0, 0, 0, self.s_k - self.s, self.blocks * self.block - self.s_k))
        return x.view(self.b, self.blocks, self.block, self.h_kv, self.group, -1).permute(0, 3, 1, 4, 2, 5)

    def positions_of_rows(self, x: Tensor) -> Tensor:
        """[u, r, d] -> [b, s, h, d]."""
        x = x.view(self.b, self.h_kv, self.blocks, self.group, self.block, -1).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(self.b, self.blocks * self.block, self.h, -1)[:, self.s_k - self.s : self.s_k]

    def keys(self, x: Tensor) -> Tensor:
        """[b, s_k, h_kv, d] -> [reach / C + u, C, d]: zeros, then all sequences and heads, one behind the other."""
        result = x.new_zeros((self.reach + self.count * self.block, x.shape[-1]), dtype=self.compute)
        self._by_head(result).copy_(x.transpose(1, 2))
        return result.view(-1, self.block, x.shape[-1])

    def _by_head(self, keys: Tensor) -> Tensor:
        """The part of such a tensor, before it is cut into blocks, that is not padding: [b, h_kv, s_k, d]."""
        return keys[self.reach :].view(self.b, self.h_kv, self.blocks * self.block, -1)[:, :, : self.s_k]

    def spans(self, keys: Tensor) -> Tensor:
        """The overlapping view [u, span, d] of the keys that each unit meets."""
        d = keys.shape[-1]
        return keys.as_strided((self.count, self.span, d), (self.block * d, d, 1))

    def positions_of_keys(self, x: Tensor) -> Tensor:
        """[reach / C + u, C, d] -> [b, s_k, h_kv, d]."""
        x = x[self.reach // self.block :].view(self.b, self.h_kv, self.blocks * self.block, -1)
        return x.transpose(1, 2)[:, : self.s_k]

    def add_to_keys(self, total: Tensor, part: slice, weights: Tensor, rows: Tensor) -> None:
        """total[keys of the unit] += weights^T rows, for every unit of the part. total: as `keys`."""
        for i in range(self.span // self.block):
            columns = weights[..., i * self.block : (i + 1) * self.block]
            total[part.start + i : part.stop + i].baddbmm_(columns.mT, rows)


class _Scores:
    """z, and the weights that come of it."""

    def __init__(
        self,
        units: _Units,
        window: int,
        doc_start: Tensor | None,
        log_sigma: Tensor,
        dropout: float,
        seed: int,
    ):
        self.units, self.dropout, self.seed = units, dropout, seed
        inverse = torch.exp(-2 * log_sigma.detach().to(units.compute)).expand(units.h)
        inverse = inverse.view(units.h_kv, 1, units.group, 1).expand(-1, units.blocks, -1, units.block)
        self.inverse_variance = inverse.expand(units.b, -1, -1, -1, -1).reshape(units.count, -1, 1)  # u r 1

        # What a row sees: the band of the window in every unit, and a later first key in some of them.
        block, blocks, device = units.block, units.blocks, units.device
        row = torch.arange(block, device=device)[:, None]
        self._column = torch.arange(units.span, device=device) - units.reach  # key - first position of the block
        band = (self._column <= row) & (self._column > row - window)
        self._band = torch.zeros(band.shape, dtype=units.compute, device=device).masked_fill(
            ~band, -torch.inf
        )  # C span

        position = torch.arange(blocks * block, device=device)
        first = torch.zeros(units.b, blocks * block, dtype=torch.int64, device=device)
        if doc_start is not None:
            first[:, units.s_k - units.s : units.s_k] = doc_start.clamp(min=0)
        short = (first > position - window + 1).view(units.b, blocks, block).any(-1)  # b blocks
        self._short = short[:, None].expand(-1, units.h_kv, -1).reshape(-1)  # u
        first = (first - position // block * block).view(units.b, 1, blocks, block)  # on the axis of _column
        self._first = first.expand(-1, units.h_kv, -1, -1).reshape(units.count, block, 1)  # u C 1
        empty = self._first > row  # sees nothing at all
        self._empty = empty.repeat(1, units.group, 1) if doc_start is not None and bool(empty.any()) else None  # u r 1

    def of(self, qu: Tensor, ku: Tensor, part: slice) -> Tensor:
        """z, [u, r, span]; -inf where the key is not seen."""
        units = self.units
        z = torch.bmm(qu[part], units.spans(ku)[part].mT)
        by_head = z.view(-1, units.group, units.block, units.span)
        by_head += self._band
        short = self._short[part].nonzero()[:, 0]
        if len(short):
            hidden = self._column < self._first[part][short]  # u C span
            by_head[short] = by_head[short].masked_fill_(hidden[:, None], -torch.inf)
        return z

    def weights(self, z: Tensor, cut: Tensor | None, part: slice) -> Tensor:
        """p, [u, r, span]: softmax of z / sigma^2 over the kept keys. Works in the memory of z."""
        if cut is not None:
            z = torch.where(z >= cut[part], z, -torch.inf)
        z *= self.inverse_variance[part]
        p = torch.softmax(z, dim=-1)
        return p if self._empty is None else p.masked_fill_(self._empty[part], 0)

    def kept(self, part: slice) -> Tensor:
        """What dropout multiplies p with, [u, r, span]: 0 or 1 / (1 - dropout)."""
        units = self.units
        unit = torch.arange(part.start, part.stop, device=units.device)[:, None, None, None]
        first = unit % units.blocks * units.block
        head = unit // units.blocks * units.group + torch.arange(units.group, device=units.device)[:, None, None]
        row = torch.arange(units.block, device=units.device)[:, None]
        mask = keep_mask(self.seed, head, first + row, first + self._column, self.dropout)
        return mask.view(part.stop - part.start, -1, units.span).to(units.compute) / (1 - self.dropout)

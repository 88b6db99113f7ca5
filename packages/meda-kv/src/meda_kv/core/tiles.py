"""The same attention in tiles that stay in the processor's cache: column sums and entropies, never the probabilities.

:func:`meda_kv.core.scan_attention` is the reference and serves every mask and device. Where each query sees the slots
up to some last one (causal attention, with or without padding, or picked queries) and the work is on a CPU, this is the
short way to the same sums (ours, not from a paper):

* a row's logits are taken relative to that of the last key it sees, which is one more column of the product, so that
  neither a maximum nor a subtraction is needed: the row's total is at least 1, and where it gets too large the caller
  is told to go the long way;
* nothing is normalised: the totals go into the weights of the column sums, ``sum_i (w_i / Z_i) exp(x_ij)``, and into
  the entropy, ``log Z_i - sum_j exp(x_ij) x_ij / Z_i``.

Each number is touched by the product, ``exp``, a sum and a product with a vector, about 0.9 ns on one AVX-512 core; a
normalised block that goes through memory takes 2 to 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meda_kv.core.blocks import check_heads, compute_dtype, drop_plain_mask, per_slot, take

# What a tile may take of a core's cache.
TILE_BYTES = 2**21
_FEWEST_ROWS, _MOST_ROWS = 32, 256
_FEWEST_QUERIES = 64
_HIDDEN = -1e30  # logit of a key that is not there
# Logits stay in a range where exp is fast: vector libraries take 10 to 40 ns for a result that is no normal float32 and
# 0.2 otherwise. What is cut off below is less than 2e-38 of a row's total; above, the total tells.
_RANGE = 87.0
_LARGEST = 1e30  # totals beyond lose the smallest weights


@dataclass(frozen=True)
class TileSums:
    """What :func:`tile_sums` made.

    Attributes
    ----------
    columns : Tensor or None
        ``[B, H, S]``: weighted column sums.
    entropy : Tensor or None
        ``[B]``: weighted sum of the rows' entropies, averaged over heads.
    """

    columns: Tensor | None
    entropy: Tensor | None


@dataclass(frozen=True)
class _Rows:
    """Some query rows against all heads: what :class:`_Plan` yields."""

    start: int
    stop: int
    last: int  # keys that any of them sees
    first: int  # from here on some row does not see all
    queries: Tensor  # [F, g * rows, E]
    future: Tensor | None  # bool [F, 1, rows, last - first]
    live: Tensor  # bool [F, rows]: rows that see a key
    narrow: bool  # logits certainly stay in the range of exp


class _Plan:
    """Keys with their extra columns, and the rows in tiles; ``F = B * Hkv`` comes first everywhere."""

    def __init__(
        self, q: Tensor, k: Tensor, reach: Tensor, valid: Tensor | None, scale: float | None, limit: int
    ) -> None:
        self.groups = check_heads(q, k)
        self.batch, self.kv_heads, self.slots, self.dim = k.shape
        self.dtype, self.reach = compute_dtype(q), reach.clamp(max=self.slots - 1)
        self.q, self.limit = q.detach(), limit
        self.factor = self.dim**-0.5 if scale is None else float(scale)
        self.keys = k.detach().to(self.dtype).contiguous()  # a cache may hold heads side by side: slow to transpose
        self.nearest = None
        real = per_slot(valid, k)
        padded = real is not None and not bool(real.all())
        self.columns = self.keys.new_empty(self.batch * self.kv_heads, self.dim + 1 + padded, self.slots)
        if real is not None and padded:
            # Keys of padding count as zero (they may hold NaN) and get a bias; a row's own key is the last real one.
            self.keys = self.keys.masked_fill(~real[..., None], 0)
            self.columns[:, -1] = torch.where(real, 0.0, _HIDDEN).flatten(0, 1)
            place = torch.arange(self.slots, device=k.device)
            self.nearest = torch.where(real, place, -1).cummax(-1).values
        self.columns[:, : self.dim] = self.keys.transpose(2, 3).flatten(0, 1)
        self.columns[:, self.dim] = 1
        # No logit exceeds the product of two norms; where that is small nothing needs to be cut off.
        self.longest = torch.linalg.vector_norm(self.keys, dim=-1).amax() if self.nearest is None else torch.inf
        most = max(1, limit // max(1, 4 * self.groups * self.slots))
        self.size = min(max(most, -(-_FEWEST_ROWS // self.groups)), _MOST_ROWS)
        self.buffers: list[Tensor] = []

    def __iter__(self) -> Iterator[_Rows]:
        """Go through the rows that see something."""
        for start in range(0, self.q.shape[2], self.size):
            stop = min(self.q.shape[2], start + self.size)
            reach = self.reach[:, start:stop]
            last, first = int(reach.max()) + 1, int(torch.where(reach < 0, self.slots, reach).min()) + 1
            if last == 0:
                continue
            place = reach.clamp(min=0)[:, None].expand(-1, self.kv_heads, -1)
            live = (reach >= 0)[:, None].expand(-1, self.kv_heads, -1)
            if self.nearest is not None:
                nearest = self.nearest.gather(2, place)
                place, live = nearest.clamp(min=0), live & (nearest >= 0)
            own = take(self.keys, place)
            rows = self.q[:, :, start:stop].to(self.dtype) * self.factor
            rows = rows.unflatten(1, (self.kv_heads, self.groups))
            narrow = bool(2 * torch.linalg.vector_norm(rows, dim=-1).amax() * self.longest < _RANGE)
            parts = [rows, -(rows * own[:, :, None]).sum(-1, keepdim=True)]
            if self.nearest is not None:
                parts.append(rows.new_ones(()).expand(*rows.shape[:-1], 1))
            # A row that sees nothing gets logits of 0 and counts with weight 0.
            queries = torch.cat(parts, -1).masked_fill_(~live[:, :, None, :, None], 0)
            future = None
            if first < last:
                future = (torch.arange(first, last, device=reach.device) > reach[..., None])[:, None, None]
                future = future.expand(-1, self.kv_heads, -1, -1, -1).flatten(0, 1)
            queries, live = queries.flatten(0, 1).flatten(1, 2), live.flatten(0, 1)
            yield _Rows(start, stop, last, first, queries, future, live, narrow)

    def tile(self, rows: _Rows, heads: slice, keep: bool = False) -> tuple[Tensor, Tensor]:
        """Return logits relative to each row's own key and their ``exp``, ``[heads, g, rows, last]``.

        The storage is reused by the next tile, and the second is written over the first unless ``keep``.
        """
        logits = self.room(rows, heads, 0)
        torch.bmm(rows.queries[heads], self.columns[heads, :, : rows.last], out=logits.flatten(1, 2))
        if not rows.narrow:
            logits.clamp_(-_RANGE, _RANGE)
        out = torch.exp(logits, out=self.room(rows, heads, 1) if keep else logits)
        if rows.future is not None:
            out[..., rows.first :].masked_fill_(rows.future[heads], 0)
        return logits, out

    def room(self, rows: _Rows, heads: slice, which: int) -> Tensor:
        """Return uninitialised storage for a tile."""
        shape = (heads.stop - heads.start, self.groups, rows.stop - rows.start, rows.last)
        need = shape[0] * shape[1] * shape[2] * shape[3]
        while len(self.buffers) <= which:
            self.buffers.append(self.keys.new_empty(0))
        if self.buffers[which].numel() < need:
            self.buffers[which] = self.keys.new_empty(max(need, self.limit // 4))
        return self.buffers[which][:need].view(shape)

    def heads(self, rows: _Rows) -> Iterator[slice]:
        """Cut ``F`` so that short tiles hold several heads."""
        step = max(1, self.limit // (4 * rows.queries.shape[1] * rows.last))
        for start in range(0, len(self.columns), step):
            yield slice(start, min(len(self.columns), start + step))


def fits_tiles(q: Tensor, softcap: float | None) -> bool:
    """Whether tiles are the shorter way: on a CPU, no soft cap, and enough rows to pay for laying out the keys."""
    return q.device.type == "cpu" and not softcap and q.shape[2] >= _FEWEST_QUERIES


@torch.no_grad()
def tile_sums(
    q: Tensor,
    k: Tensor,
    reach: Tensor,
    weights: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    columns: bool = True,
    entropy: bool = False,
    limit: int = TILE_BYTES,
) -> TileSums | None:
    """Sum attention over its rows, and the entropies of its rows, in one pass.

    Parameters
    ----------
    q : Tensor
        ``[B, H, R, D]`` queries.
    k : Tensor
        ``[B, Hkv, S, D]`` keys.
    reach : Tensor
        long ``[B, R]``: the last slot that each row sees, -1 for a row that sees nothing (its weight does not matter).
    weights : Tensor, optional
        ``[B, R]``, 1 by default. What a row of weight 0 holds does not matter, NaN included.
    valid : Tensor, optional
        bool ``[B, S]`` or ``[B, Hkv, S]``: keys that exist.
    scale : float, optional
        Factor on the logits, ``D ** -0.5`` by default.
    columns, entropy : bool
        What is wanted.
    limit : int
        Bytes of a tile; changes memory and speed, not the result.

    Returns
    -------
    TileSums or None
        None when a row's logits spread so far (by about 69) that the short way is not exact, or are not numbers: then
        :func:`meda_kv.core.scan_attention` tells.
    """
    if weights is not None:
        reach = torch.where(weights != 0, reach, -1)
    plan = _Plan(q, k, reach, valid, scale, limit)
    heads_all, groups = len(plan.columns), plan.groups
    sums = plan.keys.new_zeros(heads_all, groups, plan.slots) if columns else None
    total = plan.keys.new_zeros(heads_all) if entropy else None
    largest = plan.keys.new_zeros(())
    for rows in plan:
        weight = rows.live.to(plan.dtype)
        if weights is not None:
            mine = weights[:, rows.start : rows.stop].to(plan.dtype)
            weight = weight * mine.repeat_interleave(plan.kv_heads, 0)
        for heads in plan.heads(rows):
            logits, tile = plan.tile(rows, heads, keep=total is not None)
            z = tile.sum(-1)
            largest = torch.maximum(largest, z.amax())
            share = weight[heads, None] / z
            if sums is not None:
                sums[heads, :, : rows.last] += torch.matmul(share[..., None, :], tile)[..., 0, :]
            if total is not None:
                expected = logits.mul_(tile).sum(-1)
                total[heads] += (weight[heads, None] * z.log() - share * expected).sum((1, 2)) / groups
    if not float(largest) < _LARGEST:
        return None
    if sums is not None and plan.nearest is not None:
        sums.masked_fill_((plan.columns[:, -1] < 0)[:, None], 0)
    shaped = None if sums is None else sums.view(plan.batch, plan.kv_heads * groups, plan.slots)
    return TileSums(shaped, None if total is None else total.view(plan.batch, plan.kv_heads).mean(1))


def causal_sums(
    q: Tensor,
    k: Tensor,
    query_valid: Tensor | None,
    *,
    visible: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    offset: int = 0,
    softcap: float | None = None,
    columns: bool = True,
    entropy: bool = False,
) -> TileSums | None:
    """Sum the attention of all real queries, and their entropies, by the short way; None where only a scan serves.

    Parameters
    ----------
    q, k, visible, valid, scale, offset, softcap
        As in :func:`meda_kv.core.scan_attention`.
    query_valid : Tensor, optional
        bool ``[B, q]``: the queries that count.
    columns, entropy : bool
        What is wanted; see :class:`TileSums`.
    """
    if not fits_tiles(q, softcap):
        return None
    reach = torch.arange(offset, offset + q.shape[2], device=q.device).expand(len(q), -1)
    if query_valid is not None:
        reach = torch.where(query_valid.to(q.device), reach, -1)
    visible, valid = drop_plain_mask(visible, valid, reach, k)
    if visible is not None:
        return None
    return tile_sums(q, k, reach, valid=valid, scale=scale, columns=columns, entropy=entropy)


@torch.no_grad()
def tile_mean_entropy(
    q: Tensor,
    k: Tensor,
    reach: Tensor,
    weights: Tensor,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    limit: int = TILE_BYTES,
) -> Tensor | None:
    """Sum the entropies of the rows of the attention averaged over heads (the cross-modal kinds).

    Parameters
    ----------
    q, k, reach, weights, valid, scale, limit
        As in :func:`tile_sums`.

    Returns
    -------
    Tensor or None
        ``[B, 2]``: weighted sum of row entropies, and the summed weight of the rows that see a key in some head. None
        as in :func:`tile_sums`.
    """
    plan = _Plan(q, k, torch.where(weights != 0, reach, -1), valid, scale, limit)
    out = plan.keys.new_zeros(plan.batch, 2)
    largest = plan.keys.new_zeros(())
    tiny = torch.finfo(plan.dtype).tiny
    for rows in plan:
        count = rows.stop - rows.start
        for b in range(plan.batch):
            average = plan.room(rows, slice(0, 1), 1)[0, 0].zero_()
            for head in range(b * plan.kv_heads, (b + 1) * plan.kv_heads):
                tile = plan.tile(rows, slice(head, head + 1))[1][0]
                z = tile.sum(-1)
                largest = torch.maximum(largest, z.amax())
                share = rows.live[head].to(plan.dtype) / z
                for group in range(plan.groups):
                    average.addcmul_(tile[group], share[group, :, None])
            average /= plan.kv_heads * plan.groups
            # The storage of the tile serves once more: p log max(p, tiny) is exactly 0 at 0.
            terms = torch.clamp(average, min=tiny, out=plan.room(rows, slice(0, 1), 0)[0, 0])
            weight = weights[b, rows.start : rows.stop].to(plan.dtype)
            seen = rows.live.view(plan.batch, plan.kv_heads, count)[b].any(0)
            out[b, 0] -= (terms.log_().mul_(average).sum(-1) * weight * seen).sum()
            out[b, 1] += (weight * seen).sum()
    return out if float(largest) < _LARGEST else None

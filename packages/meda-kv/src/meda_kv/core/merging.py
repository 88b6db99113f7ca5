"""What becomes of dropped tokens: merged into the most similar kept one (MEDA Eq. 11-12, LOOK-M).

For every dropped token ``i`` of a KV head, ``j(i)`` is the kept token whose key is most similar by cosine; ``N_j`` are
the tokens that chose ``j``. Values follow the assignment of the keys.

========== ============================================================= =========================
how        kept key (and value) becomes                                  is
========== ============================================================= =========================
none       ``k_j``                                                       eviction
average    ``(k_j + sum k_i) / (|N_j| + 1)``                             MEDA
pivot      ``(k_j + sum (k_i + k_j) / 2) / (|N_j| + 1)``                 LOOK-M, its best
weighted   ``(k_j + sum u_ij k_i) / (|N_j| + 1)``, ``u`` the similarity  LOOK-M
========== ============================================================= =========================

Merged keys average different rotary phases. That is the papers' method; it can blur what a later question needs to
find again, so ``how="none"`` and ``merge_keys=False`` (values only) are one argument away.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.core.blocks import MAX_BLOCK_BYTES, check_block, compute_dtype, per_slot, take, with_smaller_blocks
from meda_kv.core.selection import keep_mask

HOW: tuple[str, ...] = ("none", "average", "pivot", "weighted")
_CPU_BLOCK_BYTES = 2 * 2**20
# Where the best of many is searched, the best of each so many first: a maximum without its place is five times faster.
_STRIP = 64


def take_slots(x: Tensor, keep: Tensor) -> Tensor:
    """Gather kept slots of ``[B, Hkv, S, D]`` into new storage ``[B, Hkv, S', D]``; -1 comes out zero."""
    out = take(x, keep)
    return out.masked_fill_((keep < 0)[..., None], 0) if bool((keep < 0).any()) else out


def _check(k: Tensor, v: Tensor, keep: Tensor) -> None:
    if k.shape[:3] != v.shape[:3] or k.dim() != 4 or keep.shape[:2] != k.shape[:2] or keep.dim() != 3:
        raise UserError(
            "keys and values [B, Hkv, S, D] and kept slots [B, Hkv, S'] do not fit together",
            where="k, v, keep",
            given=f"{tuple(k.shape)}, {tuple(v.shape)}, {tuple(keep.shape)}",
        )


def dropped_slots(keep: Tensor, slots: int, valid: Tensor | None) -> Tensor:
    """Return the real slots that are not kept, ascending, long ``[B, Hkv, most]`` with -1 as padding on the right."""
    dropped = ~keep_mask(keep, slots)
    if valid is not None:
        dropped &= valid
    count = dropped.sum(-1, keepdim=True)
    most = int(count.max()) if count.numel() else 0
    order = torch.argsort(~dropped, dim=-1, stable=True)[..., :most]
    return order.masked_fill(torch.arange(most, device=keep.device) >= count, -1)


@torch.no_grad()
def nearest_kept(k: Tensor, keep: Tensor, dropped: Tensor, block: int = 4096) -> tuple[Tensor, Tensor]:
    """Find for every dropped slot the kept one with the most similar key.

    Parameters
    ----------
    k : Tensor
        ``[B, Hkv, S, D]``.
    keep, dropped : Tensor
        Slot indices ``[B, Hkv, S']`` and ``[B, Hkv, N]``, -1 as padding.
    block : int
        Most dropped slots compared at a time; fewer where the block would exceed 256 MB (16 MB on a CPU).

    Returns
    -------
    (Tensor, Tensor)
        Index into ``keep``, long ``[B, Hkv, N]`` (the first on a tie), and the cosine similarity ``[B, Hkv, N]``.
        Where ``dropped`` is -1 both are 0.
    """
    check_block(block)
    batch, heads, slots, dim = k.shape
    dtype = compute_dtype(k)
    unit = k.detach().to(dtype).reshape(batch * heads, slots, dim)
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    kept = keep.reshape(batch * heads, -1)
    # Whole strips: the first kept slot again stands where there is none, and loses every tie to itself.
    width = -(-kept.shape[1] // _STRIP) * _STRIP if kept.shape[1] >= 4 * _STRIP else kept.shape[1]
    places = kept.new_zeros(len(kept), width)
    places[:, : kept.shape[1]] = kept.clamp(min=0)
    places[:, kept.shape[1] :] = places[:, :1]
    pivots = take(unit[None], places[None])[0].transpose(1, 2).contiguous()
    empty = places.new_zeros(places.shape, dtype=torch.bool)
    empty[:, : kept.shape[1]] = kept < 0
    gaps, storage = bool(empty.any()), unit.new_empty(0)
    sources = dropped.reshape(batch * heads, -1)
    limit = _CPU_BLOCK_BYTES if k.device.type == "cpu" else MAX_BLOCK_BYTES
    index = dropped.new_zeros(batch * heads, sources.shape[1])
    best = torch.zeros(batch * heads, sources.shape[1], dtype=dtype, device=k.device)
    # As many heads at a time as leave a block at least 64 rows.
    together = max(1, min(len(kept), limit // max(1, 4 * 64 * width)))
    block = max(1, min(block, sources.shape[1], limit // max(1, 4 * together * width)))

    def compute(start: int, size: int) -> int:
        stop = min(sources.shape[1], start + size)
        for first in range(0, len(kept), together):
            part = slice(first, first + together)
            rows = take(unit[None, part], sources[None, part, start:stop])[0]
            count = rows.shape[0] * rows.shape[1] * width
            if len(storage) < count:
                storage.resize_(count)  # one for all blocks: fresh pages for each would double the time on a CPU
            alike = storage[:count].view(*rows.shape[:2], width)
            torch.bmm(rows, pivots[part], out=alike)
            if gaps:
                alike.masked_fill_(empty[part, None], -math.inf)
            best[part, start:stop], index[part, start:stop] = _first_best(alike)
        return stop

    start = 0
    while start < sources.shape[1]:
        start, block = with_smaller_blocks(partial(compute, start), block, "merging", "merge_block")
    index.masked_fill_(index >= kept.shape[1], 0)
    nothing = dropped < 0
    return (
        index.view(batch, heads, -1).masked_fill_(nothing, 0),
        best.view(batch, heads, -1).masked_fill_(nothing, 0),
    )


def _first_best(alike: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum along the last dimension and its first place, of ``[F, rows, kept]``."""
    if alike.device.type != "cpu" or alike.shape[2] < 4 * _STRIP or alike.shape[2] % _STRIP:
        found = alike.max(-1)
        return found.values, found.indices
    strips = alike.unflatten(2, (-1, _STRIP))
    strip = strips.amax(-1).max(-1).indices
    inside = strips.gather(2, strip[..., None, None].expand(-1, -1, 1, _STRIP))[:, :, 0].max(-1)
    return inside.values, strip * _STRIP + inside.indices


def gate_mask(similarity: Tensor, real: Tensor, gate: str | float) -> Tensor:
    """Return which dropped slots are similar enough to be merged.

    Parameters
    ----------
    similarity : Tensor
        ``[B, Hkv, N]``: best similarity of the dropped slots in ascending order.
    real : Tensor
        bool ``[B, Hkv, N]``.
    gate : "none", "mean" or float
        ``"mean"`` is the official code's intent: the ``i``-th dropped slots of all heads pass together when their mean
        similarity reaches the mean over everything dropped in that row. A number is a threshold per slot and head.
    """
    if isinstance(gate, str) and gate == "none":
        return real
    if isinstance(gate, str) and gate == "mean":
        zeroed = torch.where(real, similarity, 0)
        average = zeroed.sum((1, 2)) / real.sum((1, 2)).clamp(min=1)
        by_rank = zeroed.sum(1) / real.sum(1).clamp(min=1)
        return real & (by_rank >= average[:, None])[:, None]
    if not isinstance(gate, (int, float)) or isinstance(gate, bool) or not -1.0 <= gate <= 1.0:
        raise UserError(
            "unknown merge gate", where="gate", given=repr(gate), remedy="use none, mean or a cosine between -1 and 1"
        )
    return real & (similarity >= gate)


def _blend(
    x: Tensor, keep: Tensor, dropped: Tensor, index: Tensor, weight: Tensor, counts: Tensor, own: Tensor
) -> Tensor:
    """``(own_j x_j + sum_i weight_i x_i) / counts_j``, accumulated in float32, in the dtype of ``x``."""
    dtype = compute_dtype(x)
    width = (-1, -1, -1, x.shape[-1])
    total = take_slots(x, keep).to(dtype) * own[..., None]
    # Slots in chunks: gathered values in float32 would otherwise be a second copy of the whole layer.
    step = max(1, 2**22 // max(1, x.shape[-1] * x.shape[0] * x.shape[1]))
    for start in range(0, dropped.shape[2], step):
        part = slice(start, start + step)
        source = take(x, dropped[..., part]).to(dtype)
        source.masked_fill_((dropped[..., part] < 0)[..., None], 0)  # what stands in padding may not be a number
        total.scatter_add_(2, index[..., part, None].expand(width), source * weight[..., part, None])
    return (total / counts[..., None]).masked_fill_((keep < 0)[..., None], 0).to(x.dtype)


@torch.no_grad()
def merge(
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    how: str = "average",
    gate: str | float = "none",
    merge_keys: bool = True,
    block: int = 4096,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep some slots of a layer and merge the dropped ones into them.

    Parameters
    ----------
    k, v : Tensor
        ``[B, Hkv, S, D]``, keys after RoPE.
    keep : Tensor
        long ``[B, Hkv, S']``: kept slots; -1 as padding, which comes out zero.
    how : {"none", "average", "pivot", "weighted"}
        See the table of this module.
    gate : "none", "mean" or float
        Which dropped slots are merged: all (the paper), those at or above the mean similarity (the official code's
        intent), or those whose cosine reaches a number.
    merge_keys : bool
        False merges values only and leaves keys as they are.
    block : int
        Most dropped slots compared at a time (``merge_block`` of a cache); changes memory, not the result.
    valid : Tensor, optional
        bool ``[B, S]`` or ``[B, Hkv, S]``: padding is neither kept nor merged.

    Returns
    -------
    (Tensor, Tensor)
        ``[B, Hkv, S', D]`` each, new storage, dtype of the input; sums are made in float32.

    Raises
    ------
    UserError
        For unknown names, a threshold outside [-1, 1], or shapes that do not fit.
    RuntimeError
        When memory runs out even in smaller blocks; names the block size to set.
    """
    if how not in HOW:
        raise UserError("unknown way to merge", where="merge", given=repr(how), remedy=f"use {', '.join(HOW)}")
    _check(k, v, keep)
    check_block(block)
    dropped = dropped_slots(keep, k.shape[2], per_slot(valid, k)) if how != "none" else keep[..., :0]
    real = dropped >= 0
    gate_mask(
        torch.zeros(real.shape, device=real.device), real, gate
    )  # an unknown gate is an error even when nothing is dropped
    if how == "none" or dropped.shape[2] == 0 or keep.shape[2] == 0:
        return take_slots(k, keep), take_slots(v, keep)
    index, similarity = nearest_kept(k, keep, dropped, block)
    passed = gate_mask(similarity, real, gate) & (keep >= 0).any(-1, keepdim=True)
    one = passed.to(similarity.dtype)
    members = torch.zeros(keep.shape, dtype=one.dtype, device=k.device).scatter_add_(2, index, one)
    weight, own = one, torch.ones_like(members)
    if how == "weighted":
        weight = similarity * one
    elif how == "pivot":
        weight, own = one / 2, 1 + members / 2
    value = _blend(v, keep, dropped, index, weight, members + 1, own)
    return (_blend(k, keep, dropped, index, weight, members + 1, own) if merge_keys else take_slots(k, keep)), value


@torch.no_grad()
def merge_by_score(
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    scores: Tensor,
    block: int = 4096,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Average values with their scores as weights and leave keys untouched (ours, not from a paper).

    ``v_j <- (s_j v_j + sum_{i in N_j} s_i v_i) / (s_j + sum s_i)``. With accumulated attention as the score this is
    what the kept token would have returned had it drawn the attention of its followers, while no rotary phases mix.

    Parameters
    ----------
    k, v, keep, block, valid
        As in :func:`merge`.
    scores : Tensor
        ``[B, Hkv, S]``; negative ones count as 0. Where a kept slot and all its followers score 0 it is unchanged.

    Returns
    -------
    (Tensor, Tensor)
        ``[B, Hkv, S', D]`` each, new storage, dtype of the input.
    """
    _check(k, v, keep)
    dropped = dropped_slots(keep, k.shape[2], per_slot(valid, k))
    if dropped.shape[2] == 0 or keep.shape[2] == 0:
        return take_slots(k, keep), take_slots(v, keep)
    index, _ = nearest_kept(k, keep, dropped, block)
    weights = scores.to(compute_dtype(v)).clamp(min=0)
    real = (dropped >= 0) & (keep >= 0).any(-1, keepdim=True)
    theirs = weights.gather(2, dropped.clamp(min=0)) * real
    own = weights.gather(2, keep.clamp(min=0))
    total = own.scatter_add(2, index, theirs)
    empty = total <= 0
    own, total = torch.where(empty, 1, own), torch.where(empty, 1, total)
    return take_slots(k, keep), _blend(v, keep, dropped, index, theirs, total, own)

"""Entropy of a layer's attention, the quantity that MEDA gives budgets by (arXiv 2502.17599, Eq. 4-6).

Three kinds, all in nats, one number per row of the batch:

============== ================== ======== ================================ =========================
kind           softmax over       causal   heads                            is
============== ================== ======== ================================ =========================
cross          the other modality no       attention averaged, then entropy the paper's Eq. 4-6
cross-causal   the other modality yes      attention averaged, then entropy ours: no key from the future
self           all visible keys   yes      entropy per head, then averaged  the official code
============== ================== ======== ================================ =========================

The two cross kinds are ``E_TV + E_VT``: the mean entropy of text queries over visual keys plus that of visual queries
over text keys. They cost ``2 n_T n_V`` logits per head instead of ``n^2``. Queries that see no key of the other
modality are not counted.

A mean over rows needs not all rows: ``rows=256`` takes a stratified sample of each modality's queries (ours, not from
a paper). The same draws serve every layer, so that their differences, which is what budgets are made of, keep even less
of the sampling error than the entropies themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.core.blocks import (
    block_rows,
    check_block,
    check_heads,
    compute_dtype,
    drop_plain_mask,
    per_slot,
    scan_attention,
    take,
)
from meda_kv.core.scores import sample_rows
from meda_kv.core.tiles import causal_sums, fits_tiles, tile_mean_entropy, tile_sums

KINDS: tuple[str, ...] = ("cross", "cross-causal", "self")
# Fewer probabilities than this in one row of the batch are one block of a scan, which costs fewer calls than tiles.
_SMALL = 2**17


def check_kind(kind: str) -> str:
    """Return ``kind`` when it is one of the three, else raise :class:`UserError`."""
    if kind not in KINDS:
        raise UserError("unknown kind of entropy", where="entropy", given=repr(kind), remedy=f"use {', '.join(KINDS)}")
    return kind


def check_rows(rows: int | None) -> None:
    """Raise :class:`UserError` unless ``rows`` is None or at least 1."""
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise UserError("a sample has at least one row", where="rows", given=repr(rows), remedy="use e.g. 256, or None")


def _sample(wanted: Tensor, rows: int | None) -> tuple[Tensor, Tensor]:
    """Pick all wanted queries, or a stratified sample: indices long ``[B, R]``, -1 as padding, and their weights."""
    every = _pick(wanted)
    if rows is None or every.shape[1] <= rows:
        return every, (every >= 0).float()
    ordinals, weights = sample_rows(wanted.sum(1), rows, always=0)
    return torch.where(ordinals >= 0, every.gather(1, ordinals.clamp(min=0)), -1), weights


def _pick(wanted: Tensor) -> Tensor:
    """Indices of the True entries of ``[B, q]``, ascending, padded on the right with -1: long ``[B, most]``."""
    most = int(wanted.sum(1).max()) if wanted.numel() else 0
    order = torch.argsort(~wanted, dim=1, stable=True)[:, :most] if most else wanted.new_zeros((len(wanted), 0)).long()
    real = torch.arange(most, device=wanted.device) < wanted.sum(1, keepdim=True)
    return torch.where(real, order, -1)


def cross_entropy_sums(
    q: Tensor,
    k: Tensor,
    query_visual: Tensor,
    key_visual: Tensor,
    *,
    causal: bool,
    query_valid: Tensor | None = None,
    valid: Tensor | None = None,
    visible: Tensor | None = None,
    offset: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    block: int | None = None,
    rows: int | None = None,
) -> Tensor:
    """Sum the row entropies of cross-modal attention, ready to be added up over chunks of a prompt.

    Parameters
    ----------
    q, k : Tensor
        ``[B, H, q, D]`` and ``[B, Hkv, S, D]``, after RoPE.
    query_visual : Tensor
        bool ``[B, q]``.
    key_visual : Tensor
        bool ``[B, S]`` or ``[B, Hkv, S]``.
    causal : bool
        Whether a query sees only the keys that ``visible`` (or causality from ``offset``) grants it.
    query_valid, valid : Tensor, optional
        Real queries ``[B, q]`` and real keys ``[B, S]`` or ``[B, Hkv, S]``.
    visible : Tensor, optional
        bool ``[B, 1 | H, q, S]``; only read when ``causal``.
    offset : int
        Slot of the first query.
    scale, softcap
        As in :func:`meda_kv.core.scan_attention`.
    block : int, optional
        Rows per block of a scan; by default whatever is fastest.
    rows : int, optional
        Queries of each modality in a stratified sample; a row of the sample counts for all of its stratum.

    Notes
    -----
    Where heads hold other slots (after a compression), attention is averaged over heads by the rank of the key. The
    softmax runs over the keys of the other modality and nothing else, so attention sinks have no part in it.

    Returns
    -------
    Tensor
        float ``[B, 2, 2]``: for text queries (first) and visual queries the sum of row entropies and the number of
        rows that saw a key of the other modality.
    """
    check_heads(q, k)
    check_block(block)
    check_rows(rows)
    seen_key = per_slot(key_visual, k)
    assert seen_key is not None
    real_key = per_slot(valid, k)
    out: list[Tensor] = []
    for visual_rows in (False, True):
        wanted = query_visual == visual_rows
        if query_valid is not None:
            wanted = wanted & query_valid
        keys_wanted = seen_key != visual_rows
        if real_key is not None:
            keys_wanted = keys_wanted & real_key
        picked, weights = _sample(wanted, rows)
        # Heads hold the same number of keys of a modality but, after a compression, not at the same slots.
        if bool((keys_wanted == keys_wanted[:, :1]).all()):
            keys_wanted = keys_wanted[:, :1]
        columns = _pick(keys_wanted.flatten(0, 1)).unflatten(0, keys_wanted.shape[:2])
        if picked.shape[1] and columns.shape[2]:
            keys = take(k, columns)
            shown, reach = _grants(picked, columns, causal, visible, offset)
            real = (columns >= 0).expand(-1, k.shape[1], -1) if bool((columns < 0).any()) else None
            out.append(_mean_rows(take(q, picked[:, None]), keys, weights, shown, reach, real, scale, softcap, block))
        else:
            out.append(torch.zeros(len(q), 2, dtype=compute_dtype(q), device=q.device))
    return torch.stack(out, 1)


def _mean_rows(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    visible: Tensor | None,
    reach: Tensor | None,
    valid: Tensor | None,
    scale: float | None,
    softcap: float | None,
    block: int | None,
) -> Tensor:
    """Sum the entropies of the head-averaged rows of picked queries over picked keys, and their weights, ``[B, 2]``."""
    large = q.shape[1] * q.shape[2] * k.shape[2] >= _SMALL
    if block is None and reach is not None and large and fits_tiles(q, softcap):
        short = tile_mean_entropy(q, k, reach, weights, valid=valid, scale=scale)
        if short is not None:
            return short
    sums = torch.zeros(len(q), 2, dtype=compute_dtype(q), device=q.device)
    scan = scan_attention(q, k, visible=visible, reach=reach, valid=valid, scale=scale, softcap=softcap, block=block)
    for start, stop, probs in scan:
        average = probs.mean(1)
        mine = weights[:, start:stop].to(average.dtype)
        sums[:, 0] += self_entropy_rows(average[:, None], mine)
        sums[:, 1] += (mine * (average.sum(-1) > 0)).sum(1)
    return sums


def _grants(
    rows: Tensor, columns: Tensor, causal: bool, visible: Tensor | None, offset: int
) -> tuple[Tensor | None, Tensor | None]:
    """Which picked key each picked query may see: a mask ``[B, Hkv | H, R, C]``, or the last column ``[B, R]``."""
    exists = rows >= 0
    if not causal:
        return None, torch.where(exists, columns.shape[2] - 1, -1)
    if visible is None and columns.shape[1] == 1:
        # Columns ascend, so what a row sees is a number of columns; padding (-1) is moved behind every row.
        slot = torch.where(columns[:, 0] < 0, torch.iinfo(torch.long).max, columns[:, 0])
        reach = torch.searchsorted(slot.contiguous(), (rows + offset).contiguous(), right=True) - 1
        return None, torch.where(exists, reach, -1)
    if visible is None:
        return exists[:, None, :, None] & (columns[:, :, None] <= (rows + offset)[:, None, :, None]), None
    shown = take(visible, rows[:, None])
    if shown.shape[1] != 1 and columns.shape[1] not in (1, shown.shape[1]):
        columns = columns.repeat_interleave(shown.shape[1] // columns.shape[1], 1)
    heads = max(shown.shape[1], columns.shape[1])
    index = columns.clamp(min=0)[:, :, None].expand(-1, heads, rows.shape[1], -1)
    return exists[:, None, :, None] & shown.expand(-1, heads, -1, -1).gather(3, index), None


def finish_cross(sums: Tensor) -> Tensor:
    """Turn the sums of :func:`cross_entropy_sums` into ``E_TV + E_VT``, ``[B]``; NaN where a direction has no row."""
    return (sums[..., 0] / sums[..., 1]).sum(-1)


def self_entropy_sums(
    q: Tensor,
    k: Tensor,
    rows: int,
    *,
    query_valid: Tensor | None = None,
    valid: Tensor | None = None,
    visible: Tensor | None = None,
    offset: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Sum the row entropies of ordinary attention over a stratified sample of its queries.

    Parameters
    ----------
    q, k, query_valid, valid, visible, offset, scale, softcap, block
        As in :func:`cross_entropy_sums`.
    rows : int
        Queries in the sample; a row of the sample counts for all of its stratum.
    sinks : Tensor, optional
        ``[H]``: attention sinks, see :func:`meda_kv.core.scan_attention`. What they draw is no term of the entropy.

    Returns
    -------
    Tensor
        float ``[B, 2]``: the sum of row entropies, averaged over heads, and the number of real queries.
    """
    check_rows(rows)
    wanted = torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device) if query_valid is None else query_valid
    picked, weights = _sample(wanted, rows)
    reach = torch.where(picked >= 0, picked + offset, -1)
    query = take(q, picked[:, None])
    shown = None if visible is None else take(visible, picked[:, None]) & (picked >= 0)[:, None, :, None]
    shown, valid = drop_plain_mask(shown, valid, reach, k)
    if block is None and shown is None and sinks is None and fits_tiles(query, softcap):
        short = tile_sums(query, k, reach, weights, valid=valid, scale=scale, columns=False, entropy=True)
        if short is not None and short.entropy is not None:
            return torch.stack([short.entropy, weights.sum(1).to(short.entropy.dtype)], 1)
    sums = torch.zeros(len(q), 2, dtype=compute_dtype(q), device=q.device)
    sums[:, 1] = weights.sum(1)
    scan = scan_attention(
        query,
        k,
        visible=shown,
        reach=reach if shown is None else None,
        valid=valid,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        block=block,
    )
    for start, stop, probs in scan:
        sums[:, 0] += self_entropy_rows(probs, weights[:, start:stop])
    return sums


def self_entropy_rows(probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over rows of the head-averaged row entropy of a block of attention.

    Parameters
    ----------
    probs : Tensor
        ``[B, H, rows, keys]``.
    weights : Tensor, optional
        ``[B, rows]``: what each row counts, or bool: which rows are real.

    Returns
    -------
    Tensor
        ``[B]`` in nats; divide by the number of real rows for the mean.
    """
    # One head at a time stays in the processor's cache. p log max(p, tiny) is exactly 0 at 0 and, unlike torch's entr,
    # runs on vector instructions: 1.7 instead of 4.2 ns per entry.
    term = torch.empty_like(probs[:, 0])
    per_row = torch.zeros(probs.shape[0], probs.shape[2], dtype=probs.dtype, device=probs.device)
    tiny = torch.finfo(probs.dtype).tiny
    for head in probs.unbind(1):
        torch.clamp(head, min=tiny, out=term)
        per_row -= term.log_().mul_(head).sum(-1)
    per_row /= probs.shape[1]
    if weights is not None:
        per_row = per_row * weights
    return per_row.sum(-1)


@torch.no_grad()
def attention_entropy(
    q: Tensor,
    k: Tensor,
    visual: Tensor,
    kind: str = "cross",
    valid: Tensor | None = None,
    scale: float | None = None,
    block: int | None = None,
    rows: int | None = None,
) -> Tensor:
    """Attention entropy of one layer over a whole prompt (MEDA Eq. 4-6, or the official code's).

    Parameters
    ----------
    q : Tensor
        ``[B, H, n, D]`` queries after RoPE.
    k : Tensor
        ``[B, Hkv, n, D]`` keys after RoPE.
    visual : Tensor
        bool ``[B, n]``: image and video placeholder tokens.
    kind : {"cross", "cross-causal", "self"}
        See the table of this module.
    valid : Tensor, optional
        bool ``[B, n]``: real tokens. Padding is neither a query nor a key.
    scale : float, optional
        Factor on the logits, ``D ** -0.5`` by default.
    block : int, optional
        Most query rows computed at a time, fewer where they would exceed 256 MB (16 MB on a CPU); by default whatever
        is fastest. Changes memory and speed, not the result.
    rows : int, optional
        Queries of each modality (kind ``"self"``: of the prompt) in a stratified sample, which costs as much less as
        it is smaller (ours, not from a paper). The draws are fixed. The mean over draws is the exact entropy, for
        ``"cross-causal"`` up to the rows that see nothing. None takes all queries, as the paper does.

    Returns
    -------
    Tensor
        ``[B]`` in nats, float32 (float64 for float64 input). Cross kinds lie in ``[0, log n_V + log n_T]`` and are NaN
        for a row of one modality only; ``self`` lies in ``[0, log n]``.

    Raises
    ------
    UserError
        For an unknown kind or shapes that do not fit.
    """
    check_kind(kind)
    check_block(block)
    check_heads(q, k)
    visual = visual.to(q.device)
    valid = None if valid is None else valid.to(q.device)
    if kind != "self":
        sums = cross_entropy_sums(
            q,
            k,
            visual,
            visual,
            causal=kind == "cross-causal",
            query_valid=valid,
            valid=valid,
            scale=scale,
            block=block,
            rows=rows,
        )
        return finish_cross(sums)
    if rows is not None:
        sums = self_entropy_sums(q, k, rows, query_valid=valid, valid=valid, scale=scale, block=block)
        return sums[:, 0] / sums[:, 1]
    count = torch.full((len(q),), q.shape[2], device=q.device) if valid is None else valid.sum(1)
    if block is None:
        short = causal_sums(q, k, valid, valid=valid, scale=scale, columns=False, entropy=True)
        if short is not None and short.entropy is not None:
            return short.entropy / count
    total = torch.zeros(len(q), dtype=compute_dtype(q), device=q.device)
    if block is not None:
        block = min(block, block_rows(len(q), q.shape[1], q.shape[2], q.device, q.shape[2]))
    for start, stop, probs in scan_attention(q, k, valid=valid, scale=scale, block=block):
        total += self_entropy_rows(probs, None if valid is None else valid[:, start:stop])
    return total / count

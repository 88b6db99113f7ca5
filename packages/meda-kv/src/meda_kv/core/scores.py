"""Which tokens the prompt looked at: accumulated attention (H2O, MEDA Eq. 8) and a window's attention (SnapKV).

Accumulated attention is the column sum ``A_s[j] = sum_i softmax(Q K^T)_ij`` over all queries of the prompt; it is
computed in blocks of queries with one float32 softmax pass and never holds an ``n x n`` matrix; where nothing but the
sums is wanted, on a CPU, by the shorter way of :mod:`meda_kv.core.tiles`. Fewer queries cost less: only text queries,
only the last ``W``, or a stratified sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.core.blocks import (
    check_block,
    check_heads,
    compute_dtype,
    drop_plain_mask,
    group_heads,
    per_slot,
    scan_attention,
    take,
)
from meda_kv.core.tiles import causal_sums, fits_tiles, tile_sums

# A sample of queries always contains the last ones: they ask the question, and they cost little.
ALWAYS_LAST = 32


def parse_queries(queries: str) -> tuple[str, int]:
    """Read ``"all"``, ``"text"``, ``"window:W"`` or ``"sample:S"`` into a kind and a count.

    Raises
    ------
    UserError
        For anything else, ``W < 1``, or ``S`` not above 32 (the last 32 queries are always in the sample).
    """
    kind, _, number = queries.partition(":") if isinstance(queries, str) else ("", "", "")
    if kind in ("all", "text") and not number and ":" not in queries:
        return kind, 0
    if kind in ("window", "sample") and number.isdecimal():
        least = 1 if kind == "window" else ALWAYS_LAST + 1
        if int(number) < least:
            raise UserError("too few queries", where="queries", given=queries, remedy=f"use {kind}:{least} or more")
        return kind, int(number)
    raise UserError(
        "unknown choice of queries",
        where="queries",
        given=repr(queries),
        remedy="use all, text, window:W (such as window:32) or sample:S (such as sample:512)",
    )


def sample_rows(
    count: Tensor, size: int, generator: torch.Generator | None = None, always: int = ALWAYS_LAST
) -> tuple[Tensor, Tensor]:
    """Draw a stratified sample of queries (ours, not from a paper).

    The last 32 queries are always in, with weight 1. The ``m`` queries before them are cut into ``size - 32`` strata
    of (nearly) equal length; one query of each is drawn uniformly and weighs as much as its stratum is long, so that
    weighted column sums (and means over rows) are unbiased.

    Parameters
    ----------
    count : Tensor
        long ``[B]``: queries of each row.
    size : int
        Sample size per row, above ``always``.
    generator : torch.Generator, optional
        On the CPU; seed 0 when absent. Rows use the same draws, so a row's sample depends on its own count only.
    always : int
        How many of the last queries are always in; 32 unless said otherwise.

    Returns
    -------
    (Tensor, Tensor)
        Ordinals long ``[B, size]``, ascending, -1 where a row has fewer queries than that, and float32 weights.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    strata = size - always
    draw = torch.rand(strata, generator=generator, dtype=torch.float64)
    rows, weights = [], []
    for n in count.tolist():
        if n <= size:
            ordinals, weight = torch.arange(n), torch.ones(n)
        else:
            edges = torch.arange(strata + 1) * (n - always) // strata
            length = edges[1:] - edges[:-1]
            picked = edges[:-1] + (draw * length).long().clamp(max=length - 1)
            ordinals = torch.cat([picked, torch.arange(n - always, n)])
            weight = torch.cat([length.float(), torch.ones(always)])
        rows.append(F.pad(ordinals, (0, size - len(ordinals)), value=-1))
        weights.append(F.pad(weight, (0, size - len(weight))))
    return torch.stack(rows).to(count.device), torch.stack(weights).to(count.device)


def pick_queries(
    queries: str,
    query_valid: Tensor,
    query_visual: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the queries whose attention counts.

    Parameters
    ----------
    queries : str
        ``"text"``, ``"window:W"`` or ``"sample:S"`` (``"all"`` picks every real one).
    query_valid : Tensor
        bool ``[B, q]``.
    query_visual : Tensor, optional
        bool ``[B, q]``, needed for ``"text"``.
    generator : torch.Generator, optional
        For ``"sample:S"``.

    Returns
    -------
    (Tensor, Tensor)
        Row indices long ``[B, R]``, ascending, -1 as padding on the right, and float32 weights ``[B, R]``.
    """
    kind, size = parse_queries(queries)
    wanted = query_valid
    if kind == "text":
        if query_visual is None:
            raise UserError("text queries need to know the visual tokens", where="visual", remedy="give visual=")
        wanted = wanted & ~query_visual
    count = wanted.sum(1)
    order = torch.argsort(~wanted, dim=1, stable=True)
    if kind == "sample":
        ordinals, weights = sample_rows(count, size, generator)
    else:
        most = min(int(count.max()), size) if kind == "window" else int(count.max())
        first = (count - most).clamp(min=0) if kind == "window" else torch.zeros_like(count)
        ordinals = first[:, None] + torch.arange(most, device=wanted.device)
        ordinals = torch.where(ordinals < count[:, None], ordinals, -1)
        weights = (ordinals >= 0).float()
    used = int((ordinals >= 0).sum(1).max()) if ordinals.numel() else 0
    ordinals, weights = ordinals[:, :used], weights[:, :used]
    return torch.where(ordinals >= 0, order.gather(1, ordinals.clamp(min=0)), -1), weights


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Take rows ``[B, R]`` (-1 reads row 0) of ``[B, H, q, D]``."""
    return take(x, rows[:, None])


def column_sums(probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum attention over its rows: ``[B, H, rows, keys] -> [B, H, keys]``, weighted by ``[B, rows]``.

    A product with a row vector: one pass over the block, no copy.
    """
    if weights is None:
        vector = probs.new_ones((1, 1, 1, probs.shape[2])).expand(*probs.shape[:2], 1, -1)
    else:
        vector = weights.to(probs.dtype)[:, None, None].expand(-1, probs.shape[1], -1, -1)
    return torch.matmul(vector, probs)[:, :, 0]


def picked_sums(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    weights: Tensor,
    *,
    visible: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    offset: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Weighted column sums over picked query rows, ``[B, H, S]``; arguments as :func:`accumulated_scores`."""
    check_block(block)
    out = torch.zeros(*q.shape[:2], k.shape[2], dtype=compute_dtype(q), device=q.device)
    if rows.shape[1] == 0:
        return out
    exists = rows >= 0
    reach = torch.where(exists, rows + offset, -1)
    picked = gather_rows(q, rows)
    shown = None if visible is None else gather_rows(visible, rows) & exists[:, None, :, None]
    shown, valid = drop_plain_mask(shown, valid, reach, k)
    if block is None and shown is None and sinks is None and fits_tiles(picked, softcap):
        short = tile_sums(picked, k, reach, weights, valid=valid, scale=scale)
        if short is not None and short.columns is not None:
            return short.columns
    blocks = scan_attention(
        picked,
        k,
        visible=shown,
        reach=reach if shown is None else None,
        valid=valid,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        block=block,
    )
    for start, stop, probs in blocks:
        out[:, :, : probs.shape[3]] += column_sums(probs, weights[:, start:stop])
    return out


@torch.no_grad()
def accumulated_scores(
    q: Tensor,
    k: Tensor,
    queries: str = "all",
    group: str = "mean",
    valid: Tensor | None = None,
    scale: float | None = None,
    block: int | None = None,
    offset: int = 0,
    visual: Tensor | None = None,
    visible: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Accumulated attention of every key (H2O; ``A_s`` of MEDA Eq. 8).

    Parameters
    ----------
    q : Tensor
        ``[B, H, q, D]`` queries after RoPE.
    k : Tensor
        ``[B, Hkv, S, D]`` keys after RoPE.
    queries : str
        Whose attention is summed: ``"all"`` (the paper), ``"text"``, ``"window:W"`` (the last ``W``), or
        ``"sample:S"`` (ours: a stratified sample of ``S`` queries including the last 32, unbiased for ``"all"``).
    group : {"mean", "max", "sum"}
        How the query heads of a KV head are joined.
    valid : Tensor, optional
        bool ``[B, S]`` or ``[B, Hkv, S]``: real slots. Queries are the slots from ``offset`` on.
    scale : float, optional
        Factor on the logits, ``D ** -0.5`` by default.
    block : int, optional
        Query rows computed at a time; changes memory and speed, not the result. By default whatever is fastest, which
        need not normalise whole blocks; with a number, blocks of so many rows.
    offset : int
        Slot of the first query.
    visual : Tensor, optional
        bool ``[B, S]``, needed for ``queries="text"``.
    visible : Tensor, optional
        bool ``[B, 1 | H, q, S]`` instead of plain causality.
    softcap : float, optional
        Soft cap on the logits.
    sinks : Tensor, optional
        ``[H]``: attention sinks, see :func:`scan_attention`.
    generator : torch.Generator, optional
        For ``"sample:S"``; seed 0 when absent.

    Returns
    -------
    Tensor
        ``[B, Hkv, S]``, float32 (float64 for float64 input), 0 at invalid slots. Over a KV head with
        ``group="mean"`` the scores of ``"all"`` sum to the number of queries.
    """
    check_heads(q, k)
    kind, _ = parse_queries(queries)
    real = per_slot(valid, k)
    end = offset + q.shape[2]
    query_valid = None if real is None else real[:, :, offset:end].any(1)
    if kind == "all":
        short = None
        if block is None and sinks is None:
            short = causal_sums(
                q, k, query_valid, visible=visible, valid=valid, scale=scale, offset=offset, softcap=softcap
            )
        if short is not None and short.columns is not None:
            return group_heads(short.columns, k.shape[1], group)
        total = torch.zeros(*q.shape[:2], k.shape[2], dtype=compute_dtype(q), device=q.device)
        blocks = scan_attention(
            q, k, visible=visible, valid=valid, scale=scale, offset=offset, softcap=softcap, sinks=sinks, block=block
        )
        for start, stop, probs in blocks:
            weights = None if query_valid is None else query_valid[:, start:stop]
            total[:, :, : probs.shape[3]] += column_sums(probs, weights)
        return group_heads(total, k.shape[1], group)
    if query_valid is None:
        query_valid = torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device)
    query_visual = None if visual is None else visual[:, offset:end].to(q.device)
    rows, weights = pick_queries(queries, query_valid, query_visual, generator)
    sums = picked_sums(
        q,
        k,
        rows,
        weights,
        visible=visible,
        valid=valid,
        scale=scale,
        offset=offset,
        softcap=softcap,
        sinks=sinks,
        block=block,
    )
    return group_heads(sums, k.shape[1], group)


def pool_scores(scores: Tensor, kernel: int, pool: str = "avg", valid: Tensor | None = None) -> Tensor:
    """Smooth scores along the slots as SnapKV does: 1-D pooling, stride 1, padding ``kernel // 2``.

    Parameters
    ----------
    scores : Tensor
        ``[B, Hkv, S]``, >= 0.
    kernel : int
        Odd, >= 1.
    pool : {"avg", "max"}
        Averages count the padding as zeros (as ``avg_pool1d`` does), so values at the ends shrink.
    valid : Tensor, optional
        bool ``[B, Hkv, S]``: neighbours are neighbouring real slots, whatever padding lies between them.

    Returns
    -------
    Tensor
        ``[B, Hkv, S]``, 0 at invalid slots.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise UserError(
            "the pooling kernel is an odd number of tokens", where="kernel", given=kernel, remedy="use e.g. 5"
        )
    if pool not in ("avg", "max"):
        raise UserError("unknown pooling", where="pool", given=repr(pool), remedy="use avg or max")
    order = None
    if valid is not None:
        order = torch.argsort(~valid, dim=-1, stable=True)
        scores = (scores * valid).gather(-1, order)
    function = F.avg_pool1d if pool == "avg" else F.max_pool1d
    pooled = function(scores, kernel, stride=1, padding=kernel // 2)
    if order is None or valid is None:
        return pooled
    return torch.zeros_like(pooled).scatter(-1, order, pooled) * valid


def finish_window(sums: Tensor, in_window: Tensor, kernel: int, pool: str, valid: Tensor | None) -> Tensor:
    """Pool a window's column sums over the prefix and give the window's own slots the best prefix score.

    Parameters
    ----------
    sums : Tensor
        ``[B, Hkv, S]``.
    in_window : Tensor
        bool ``[B, Hkv, S]``.
    kernel, pool, valid
        As in :func:`pool_scores`.
    """
    prefix = pool_scores(sums.masked_fill(in_window, 0.0), kernel, pool, valid).masked_fill(in_window, 0.0)
    return torch.where(in_window, prefix.amax(-1, keepdim=True), prefix)


@torch.no_grad()
def window_scores(
    q: Tensor,
    k: Tensor,
    window: int = 32,
    kernel: int = 5,
    pool: str = "avg",
    group: str = "mean",
    valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """SnapKV scores: attention of the last ``window`` queries to the tokens before them, summed and pooled.

    The softmax runs over all keys, the window's own causally, as in the official code.

    Parameters
    ----------
    q, k : Tensor
        ``[B, H, n, D]`` and ``[B, Hkv, n, D]``, after RoPE, the whole prompt.
    window : int
        Queries at the end, >= 1; more than there are counts as all.
    kernel, pool
        As in :func:`pool_scores` (official: 5 and avg, or 7 and max).
    group : {"mean", "max", "sum"}
        How the query heads of a KV head are joined.
    valid : Tensor, optional
        bool ``[B, n]``: real tokens.
    scale : float, optional
        ``D ** -0.5`` by default.

    Returns
    -------
    Tensor
        ``[B, Hkv, n]``. The window's own slots, which SnapKV always keeps, hold the largest score of the prefix; keep
        them with ``select(..., recent=window)``.
    """
    if window < 1:
        raise UserError("too small", where="window", given=window, remedy="use 1 or more")
    real = per_slot(valid, k)
    query_valid = torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device) if real is None else real.any(1)
    rows, weights = pick_queries(f"window:{window}", query_valid)
    sums = group_heads(picked_sums(q, k, rows, weights, valid=valid, scale=scale), k.shape[1], group)
    in_window = torch.zeros_like(query_valid, dtype=torch.long)
    in_window.scatter_add_(1, rows.clamp(min=0), (rows >= 0).long())
    return finish_window(sums, (in_window > 0)[:, None].expand_as(sums), kernel, pool, real)

"""Remembers the last queries of a prompt, so that a window's attention is computed once, when it is needed.

SnapKV looks from the prompt's last ``W`` tokens. Their queries are small; keeping them costs nothing while the prompt
is read, stays right when it comes in chunks, and leaves one ``W x S`` product for the moment of compression. Which
slot a kept query may see is told by the order of tokens, a slot tensor that survives gathering and cropping.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.core.blocks import scan_attention
from meda_kv.core.scores import column_sums, gather_rows, pick_queries
from meda_kv.methods.checks import check_share, is_count
from meda_kv.methods.observing import Look, State, grow

TAIL_SLOTS: tuple[str, ...] = ("order",)


def check_window(window: int | float, most: float) -> None:
    """Raise :class:`UserError` unless ``window`` is a count >= 1 or a share in (0, 1], and ``most`` such a share."""
    count = is_count(window) and window >= 1
    share = isinstance(window, float) and 0.0 < window <= 1.0
    if not count and not share:
        raise UserError(
            "a window is a count >= 1 or a share in (0, 1]", where="window", given=repr(window), remedy="use e.g. 32"
        )
    check_share("most", most, zero=False, remedy="use 1 for no limit")


def tail_size(window: int | float, n: int, most: float = 1.0) -> int:
    """Return the window of an ``n``-token prompt: a count, or a share of ``n`` when a float; at least 1.

    Parameters
    ----------
    window : int or float
        Tokens, or a share in (0, 1].
    n : int
        Prompt tokens.
    most : float
        The window is at most this share of the prompt.
    """
    size = int(window * n) if isinstance(window, float) else window
    return max(1, min(size, math.ceil(most * n)))


def remember_tail(state: State, look: Look, window: int | float) -> None:
    """Keep the last queries that any window of this size may need.

    Parameters
    ----------
    state : dict
        Gains ``order`` (slots; 1 for the first token of the row, 0 where unknown), and with the batch first
        ``queries [B, H, W, D]``, ``query_order`` and ``reach [B, W]`` (the order of the last token each query sees),
        ``scale``, ``softcap`` and ``block [B]`` (0 for none), and ``sinks [B, H]`` where the attention has any.
    look : Look
        The forward.
    window : int or float
        As in :func:`tail_size`.
    """
    real = look.query_valid
    order = grow(state, "order", look.key, torch.int32)
    before = order.amax((1, 2)).long()
    mine = torch.where(real, before[:, None] + real.cumsum(1), 0)
    order[:, :, look.offset :] = mine[:, None].to(order.dtype)
    size = math.ceil(window * int(order.max())) if isinstance(window, float) else window
    rows, _ = pick_queries(f"window:{max(1, size)}", real)
    picked = rows.clamp(min=0)
    exists = rows >= 0
    query = gather_rows(look.query, rows)
    query_order = torch.where(exists, mine.gather(1, picked), 0)
    reach = query_order
    if look.visible is not None:
        shown = gather_rows(look.visible, rows).any(1)
        reach = torch.where(exists, torch.where(shown, order.amax(1)[:, None].long(), 0).amax(-1), 0)
    if "queries" in state:
        # A token cropped away since leaves its query behind, with an order that is free again: drop it.
        old = torch.where(state["query_order"] <= before[:, None], state["query_order"], 0)
        query = torch.cat([state["queries"], query], 2)
        query_order = torch.cat([old, query_order], 1)
        reach = torch.cat([state["reach"], reach], 1)
        rows, _ = pick_queries(f"window:{max(1, size)}", query_order > 0)
        query = gather_rows(query, rows)
        picked, exists = rows.clamp(min=0), rows >= 0
        query_order = torch.where(exists, query_order.gather(1, picked), 0)
        reach = torch.where(exists, reach.gather(1, picked), 0)
    state["queries"], state["query_order"], state["reach"] = query, query_order, reach
    state["scale"] = torch.full_like(before, look.scale, dtype=torch.float64)
    state["softcap"] = torch.full_like(state["scale"], look.softcap or 0.0)
    state["block"] = torch.full_like(before, look.block or 0)
    if look.sinks is not None:
        state["sinks"] = look.sinks.to(before.device).expand(len(before), -1)


def tail_sums(state: State, key: Tensor, valid: Tensor | None, size: Callable[[int], int]) -> tuple[Tensor, Tensor]:
    """Sum the attention of each row's last queries over the slots now held.

    Parameters
    ----------
    state : dict
        From :func:`remember_tail`.
    key : Tensor
        ``[B, Hkv, S, D]``.
    valid : Tensor or None
        bool ``[B, Hkv, S]``.
    size : callable
        Tells the window of a row from the number of tokens it has read.

    Returns
    -------
    (Tensor, Tensor)
        Sums ``[B, H, S]`` and bool ``[B, Hkv, S]``: the slots of the window's own tokens.
    """
    if "queries" not in state:
        raise RuntimeError("no query was observed: the prompt was not read through this cache; call cache.reset()")
    order = grow(state, "order", key, torch.int32).long()
    read = order.amax((1, 2))
    query_order = torch.where(state["query_order"] <= read[:, None], state["query_order"], 0)
    count = (query_order > 0).sum(1, keepdim=True)
    ordinal = (query_order > 0).cumsum(1)
    wanted = torch.tensor([size(n) for n in read.tolist()], device=key.device)[:, None]
    used = (query_order > 0) & (ordinal > count - wanted)
    # Slots whose token was never observed (0) come right after the last observed one before them.
    time = torch.where(order > 0, 2 * order, 2 * order.cummax(-1).values + 1)
    sees = (time[:, :, None] <= 2 * state["reach"][:, None, :, None]) & used[:, None, :, None]
    total = torch.zeros(*state["queries"].shape[:2], key.shape[2], dtype=torch.float32, device=key.device)
    blocks = scan_attention(
        state["queries"],
        key,
        visible=sees,
        valid=valid,
        scale=float(state["scale"][0]),
        softcap=float(state["softcap"][0]) or None,
        sinks=state["sinks"][0] if "sinks" in state else None,
        block=int(state["block"][0]) or None,
    )
    for _, _, probs in blocks:
        total[:, :, : probs.shape[3]] += column_sums(probs)
    first = torch.where(used, query_order, torch.iinfo(torch.long).max).amin(1)
    return total, (order >= first[:, None, None]) & (order > 0)

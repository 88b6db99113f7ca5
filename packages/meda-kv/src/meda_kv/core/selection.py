"""Which slots a layer keeps: recent ones, important ones, text before images (MEDA, arXiv 2502.17599, Eq. 8-10).

Of a budget of ``S_l`` tokens ``M`` are the most recent and ``N`` those of highest score among the rest; kept slots
stay in their original order. The text prior of LOOK-M and MEDA (``A_s[T] += max A_s``) is applied as a rank of its
own, so that every text token outranks every visual one exactly, without the rounding that the sum would bring.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.core.quota import dealt_in_turns

TEXT_PRIORS: tuple[str, ...] = ("bias", "keep-all", "official", "off")
# What the official average-merge class adds to the text length when it widens its recent window.
OFFICIAL_EXTRA = 100


def _as_slots(mask: Tensor, scores: Tensor, name: str) -> Tensor:
    if mask.dim() == 2:
        mask = mask[:, None]
    try:
        return mask.to(device=scores.device, dtype=torch.bool).expand(scores.shape)
    except RuntimeError:
        raise UserError(
            "a mask over slots is [B, S] or [B, Hkv, S]",
            where=name,
            given=tuple(mask.shape),
            remedy=f"the scores are {tuple(scores.shape)}",
        ) from None


def _budgets(budget: int | Tensor, scores: Tensor) -> Tensor:
    rows = torch.as_tensor(budget, dtype=torch.long, device=scores.device)
    rows = rows.expand(scores.shape[0]) if rows.dim() == 0 else rows
    if rows.shape != (scores.shape[0],) or bool((rows < 0).any()):
        raise UserError(
            "a budget is a count >= 0, one for all rows or one per row", where="budget", given=rows.tolist()
        )
    return rows


@torch.no_grad()
def select(
    scores: Tensor,
    budget: int | Tensor,
    recent_share: float = 0.75,
    visual: Tensor | None = None,
    text_prior: str = "bias",
    sink: int = 0,
    valid: Tensor | None = None,
    recent: int | Tensor | None = None,
    per_head: bool = True,
    blocks: Tensor | None = None,
    quota: float = 0.0,
) -> Tensor:
    """Choose the slots to keep.

    Parameters
    ----------
    scores : Tensor
        ``[B, Hkv, S]``, finite at real slots.
    budget : int or Tensor
        Slots to keep, for all rows or long ``[B]``. More than a row has means all of it.
    recent_share : float
        Share of the budget that goes to the most recent real slots: ``M = round(budget * recent_share)``. 0.75 is the
        paper's 3 : 1, 0.5 the official code's 1 : 1.
    visual : Tensor, optional
        bool ``[B, S]`` or ``[B, Hkv, S]``: image and video tokens. Without it no text prior applies.
    text_prior : {"bias", "keep-all", "official", "off"}
        ``"bias"``: every text token outranks every visual one (Eq. 9), within the budget. ``"keep-all"``: all text is
        kept even when that exceeds the budget. ``"official"``: that, and a recent window shorter than the text is
        widened to the text length plus 100, as the official average-merge class does. ``"off"``: scores only.
    sink : int
        First real slots that are always kept.
    valid : Tensor, optional
        bool ``[B, S]`` or ``[B, Hkv, S]``: real slots; others are never kept.
    recent : int or Tensor, optional
        M itself, for all rows or long ``[B]``, instead of ``recent_share`` (SnapKV's window, StreamingLLM).
    per_head : bool
        False gives all KV heads of a row the slots of the highest mean score.
    blocks : Tensor, optional
        long ``[B, Hkv, S]`` (see `token_blocks`), negative for slots of no block; with ``quota``.
    quota : float
        Share of what is left after sink and recent slots that is dealt out in turns over the blocks before the best of
        all take the rest (ours).

    Returns
    -------
    Tensor
        long ``[B, Hkv, S']``, ascending; rows that keep fewer than the others end in -1. ``S'`` is the largest number
        kept: ``max(budget)`` where the rows have that many, more only with ``"keep-all"`` and ``"official"``. Equal
        scores keep the earlier slot.

    Raises
    ------
    UserError
        For shares, counts or names out of range.
    RuntimeError
        For scores that are not finite: a top-k over NaN would be silently wrong. Names row and head.
    """
    if scores.dim() != 3:
        raise UserError("scores are [B, Hkv, S]", where="scores", given=tuple(scores.shape))
    if not 0.0 <= recent_share <= 1.0:
        raise UserError("a share lies between 0 and 1", where="recent_share", given=recent_share)
    if text_prior not in TEXT_PRIORS:
        raise UserError(
            "unknown text prior", where="text_prior", given=repr(text_prior), remedy=f"use {', '.join(TEXT_PRIORS)}"
        )
    if not 0.0 <= quota <= 1.0:
        raise UserError("a share lies between 0 and 1", where="quota", given=quota)
    if sink < 0:
        raise UserError("too small", where="sink", given=sink, remedy="use 0 or more")
    real = torch.ones_like(scores, dtype=torch.bool) if valid is None else _as_slots(valid, scores, "valid")
    bad = ~torch.isfinite(scores) & real
    if bool(bad.any()):
        row, head = bad.any(-1).nonzero()[0].tolist()
        raise RuntimeError(f"scores of row {row}, KV head {head} are not finite; the keys or the attention overflowed")
    if not per_head:
        scores = torch.where(real, scores, 0).mean(1, keepdim=True).expand_as(scores)

    count = real.sum(-1)
    wanted = torch.minimum(_budgets(budget, scores)[:, None], count)
    rank = real.cumsum(-1) - 1
    sinks = torch.minimum(wanted, torch.full_like(wanted, sink))
    if recent is None:
        share = (wanted.double() * recent_share).round().long()
    else:
        share = _budgets(recent, scores)[:, None].expand_as(wanted)
    text = None
    if visual is not None and text_prior != "off":
        text = real & ~_as_slots(visual, scores, "visual")
    if text is not None and text_prior == "official":
        length = text.sum(-1)
        newest = torch.minimum(torch.where(share < length, length + OFFICIAL_EXTRA, share), count)
        important = (wanted - sinks - torch.minimum(share, wanted - sinks)).clamp(min=0)
    else:
        newest = torch.minimum(share, wanted - sinks)
        important = wanted - sinks - newest

    # 3 always kept, 2 dealt out, 1 text, 0 visual (or everything, without a prior), -1 not a slot.
    group = torch.zeros_like(scores, dtype=torch.int8)
    if text is not None:
        group = group.masked_fill(text, 1)
    first = rank < sinks[..., None]
    last = rank >= (count - newest)[..., None]
    if quota and blocks is not None:
        spare = (important.double() * quota).floor().long()
        group = group.masked_fill(dealt_in_turns(scores, blocks, spare, real & ~(first | last)), 2)
    group = group.masked_fill(first | last, 3).masked_fill(~real, -1)
    if text is not None and text_prior != "bias":
        others = (group == 1).sum(-1)
        wanted = torch.minimum((group == 3).sum(-1) + torch.maximum(important, others), count)

    by_score = torch.argsort(scores, dim=-1, descending=True, stable=True)
    by_group = torch.argsort(group.gather(-1, by_score), dim=-1, descending=True, stable=True)
    size = int(wanted.max()) if wanted.numel() else 0
    kept = by_score.gather(-1, by_group)[..., :size]
    beyond = torch.arange(size, device=scores.device) >= wanted[..., None]
    kept = kept.masked_fill(beyond, scores.shape[-1]).sort(-1).values
    return kept.masked_fill(kept == scores.shape[-1], -1)


def keep_mask(keep: Tensor, slots: int) -> Tensor:
    """Turn indices ``[B, Hkv, S']`` (-1 is nothing) into a bool mask ``[B, Hkv, slots]``."""
    mask = torch.zeros(*keep.shape[:2], slots + 1, dtype=torch.bool, device=keep.device)
    mask.scatter_(-1, torch.where(keep < 0, slots, keep), True)
    return mask[..., :slots]

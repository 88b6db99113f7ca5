"""The attention mask of a layer whose slots are not the tokens seen: ``[real slots of the past | this forward]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meda_kv.attention.masks import read_mask, write_mask

__all__ = ["layer_mask"]


def layer_mask(query: Tensor, slots: int, valid: Tensor | None, given: Any, base: str) -> Any:
    """Build the mask of one layer for one forward.

    Parameters
    ----------
    query : Tensor
        ``[B, H, q, D]``; its tokens are the last ``q`` slots.
    slots : int
        S, slots held after the forward's tokens were appended.
    valid : Tensor or None
        bool ``[B, 1 or Hkv, S]``: slots that hold a real token; None means all.
    given : Tensor, BlockMask or None
        The mask built for all layers. Which tokens of this forward see each other is read off its last ``q`` columns
        (images may see themselves in both directions); None stands for causal.
    base : str
        Name of the attention implementation, without prefix.

    Returns
    -------
    Tensor, BlockMask or None
        In the form that the implementation takes; None for one query over slots that are all real, and for flash
        attention, whose kernels are causal from the last slot backwards.

    Raises
    ------
    RuntimeError
        Flash attention cannot leave out single slots.
    """
    if valid is not None and "flash" in base and bool(valid.all()):
        valid = None
    if valid is None and (query.shape[2] == 1 or "flash" in base):
        return None
    return write_mask(_visible(query, slots, valid, given), base=base, dtype=query.dtype)


def _visible(query: Tensor, slots: int, valid: Tensor | None, given: Any) -> Tensor:
    """Return bool ``[B, 1 or H, q, S]``: the past as far as it is real, then this forward's own pattern."""
    rows, heads, q = query.shape[:3]
    own = _own_pattern(query, given)
    past = torch.ones((1, 1, 1, slots - q), dtype=torch.bool, device=query.device)
    if valid is not None:
        valid = valid.to(query.device)
        if valid.shape[1] > 1:
            valid = valid.repeat_interleave(heads // valid.shape[1], dim=1)
        past = valid[:, :, None, : slots - q]
        # A padding query sees at least itself: a softmax row without any key would be NaN.
        own = (own & valid[:, :, None, slots - q :]) | torch.eye(q, dtype=torch.bool, device=query.device)
    wide = max(past.shape[1], own.shape[1])
    return torch.cat([past.expand(rows, wide, q, -1), own.expand(rows, wide, q, -1)], dim=3)


def _own_pattern(query: Tensor, given: Any) -> Tensor:
    """Return bool ``[B or 1, 1 or H, q, q]``: which tokens of this forward see which."""
    rows, _, q = query.shape[:3]
    columns = q
    if isinstance(given, Tensor):
        columns = int(given.shape[-1])
    elif given is not None and hasattr(given, "seq_lengths"):
        columns = int(given.seq_lengths[1])
    visible = read_mask(given, batch=rows, queries=q, slots=columns)
    if visible is None:
        return torch.ones((q, q), dtype=torch.bool, device=query.device).tril()[None, None]
    return visible[..., -q:].to(query.device)

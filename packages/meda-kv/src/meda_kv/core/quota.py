"""A share of the budget for every picture: slots chosen in turns over blocks of tokens. Ours, not from a paper.

A score that looks from one question starves the pictures that question does not ask about, and a score over all
queries starves the late ones; the next question about them is then lost. With a quota, part of the budget is dealt out
in turns: the best slot of every block, then the second best of every block, and so on. A block is a run of visual
tokens, which is a picture (or a frame) wherever the prompt separates them by text; long runs are cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dealt_in_turns", "token_blocks"]


def token_blocks(visual: Tensor, valid: Tensor | None = None, longest: int = 64) -> Tensor:
    """Number the blocks of a prompt.

    Parameters
    ----------
    visual : Tensor
        bool ``[B, n]``: image and video tokens.
    valid : Tensor, optional
        bool ``[B, n]``: real tokens.
    longest : int
        Runs of more tokens are cut into pieces of this size, so that one large picture is covered evenly too.

    Returns
    -------
    Tensor
        long ``[B, n]``: block of every visual token, ascending from 0 in each row; -1 for text and padding. Rows
        without visual tokens are cut into blocks of text.
    """
    real = torch.ones_like(visual) if valid is None else valid.to(visual.device)
    inside = visual & real
    inside = torch.where(inside.any(1, keepdim=True), inside, real)
    before = torch.nn.functional.pad(inside[:, :-1], (1, 0))
    place = torch.arange(visual.shape[1], device=visual.device).expand(visual.shape)
    first = torch.where(inside & ~before, place, 0).cummax(1).values
    opens = inside & ((place - first) % longest == 0)
    return (opens.long().cumsum(1) - 1).masked_fill(~inside, -1)


def dealt_in_turns(scores: Tensor, blocks: Tensor, count: Tensor, eligible: Tensor) -> Tensor:
    """Choose slots in turns over the blocks.

    Parameters
    ----------
    scores : Tensor
        ``[B, Hkv, S]``.
    blocks : Tensor
        long ``[B, Hkv, S]``, negative for slots of no block.
    count : Tensor
        long ``[B, Hkv]``: slots to choose (fewer where fewer are eligible).
    eligible : Tensor
        bool ``[B, Hkv, S]``.

    Returns
    -------
    Tensor
        bool ``[B, Hkv, S]``. All first choices of the blocks come before any second choice; within a turn the higher
        score goes first, and equal scores go to the earlier slot.
    """
    open_ = eligible & (blocks >= 0)
    slots = scores.shape[-1]
    by_score = torch.argsort(scores, dim=-1, descending=True, stable=True)
    # Closed slots form a last block of their own, so that they take no turn of another.
    of = torch.where(open_, blocks, slots).gather(-1, by_score)
    by_block = torch.argsort(of, dim=-1, stable=True)
    ids = of.gather(-1, by_block)
    place = torch.arange(slots, device=scores.device).expand_as(ids)
    first = torch.cat([torch.ones_like(ids[..., :1], dtype=torch.bool), ids[..., 1:] != ids[..., :-1]], dim=-1)
    turn_sorted = place - torch.where(first, place, 0).cummax(-1).values
    turn = torch.empty_like(turn_sorted).scatter_(-1, by_block, turn_sorted)
    turn = turn.masked_fill(of == slots, slots)  # in the order of scores
    order = by_score.gather(-1, torch.argsort(turn, dim=-1, stable=True))
    chosen = torch.zeros_like(open_).scatter_(-1, order, place < count[..., None])
    return chosen & open_

"""Prompts as extra tokens of a native vision transformer (Prompt-CAM, arXiv 2501.09333, eq. 1-3).

Prompts are put before the prefix tokens (CLS, registers) and the library's own block modules run unchanged. What would
trip over the extra tokens is told about them for the time of the call: rotary tables rotate only what follows the
prefix, and relative-position biases are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from vfm_core.backbones import Backbone, Tokens

__all__ = ["join", "room_for_prompts", "run_prompted", "split"]


def join(tokens: Tokens, prompts: Tensor) -> Tokens:
    """Put prompts before the prefix tokens.

    Parameters
    ----------
    tokens : Tokens
        ``x`` of shape (B, p + M, D).
    prompts : Tensor
        (C, D), (1, C, D) or (B, C, D).

    Returns
    -------
    Tokens
        ``x`` of shape (B, C + p + M, D); the prompts count as prefix tokens.
    """
    batch = tokens.x.shape[0]
    rows = prompts.to(tokens.x.dtype).expand(batch, -1, -1)
    return replace(tokens, x=torch.cat([rows, tokens.x], dim=1), prefix=tokens.prefix + rows.shape[1])


def split(tokens: Tokens, count: int) -> tuple[Tensor, Tokens]:
    """Undo :func:`join`: the first ``count`` rows (B, count, D), and the tokens without them."""
    return tokens.x[:, :count], replace(tokens, x=tokens.x[:, count:], prefix=tokens.prefix - count)


def run_prompted(backbone: Backbone, tokens: Tokens, prompts: Tensor, start: int, stop: int) -> tuple[Tensor, Tokens]:
    """Run the native blocks ``start .. stop - 1`` on prompts and tokens together.

    Parameters
    ----------
    backbone : Backbone
        Its block modules run unchanged.
    tokens : Tokens
        (B, p + M, D) at depth ``start``.
    prompts : Tensor
        (C, D), (1, C, D) or (B, C, D).
    start, stop : int
        Block range, 0-based.

    Returns
    -------
    prompts : Tensor
        (B, C, D) after the blocks.
    tokens : Tokens
        (B, p + M, D) after the blocks.
    """
    joint = join(tokens, prompts)
    count = joint.prefix - tokens.prefix
    with room_for_prompts(backbone, joint.ctx, count, start, stop) as ctx:
        joint = backbone.run(replace(joint, ctx=ctx), start, stop)
    rows, tokens_out = split(joint, count)
    return rows, replace(tokens_out, ctx=tokens.ctx)


@contextmanager
def room_for_prompts(
    backbone: Backbone, ctx: dict[str, Any], count: int, start: int, stop: int
) -> Iterator[dict[str, Any]]:
    """Make position encodings skip ``count`` extra leading tokens for the time of the call."""
    wide = dict(ctx)
    for key, value in ctx.items():
        # BEiT's shared relative-position bias, (1, R, T, T): the prompts have no position, so no bias.
        if isinstance(value, Tensor) and "bias" in key:
            wide[key] = F.pad(value, (count, 0, count, 0))
    changed: list[Any] = []
    patched: list[Any] = []
    try:
        for index in range(start, stop):
            attention: Any = backbone.attention(index)
            if hasattr(attention, "num_prefix_tokens"):  # timm's rotary attentions rotate what follows the prefix
                attention.num_prefix_tokens += count
                changed.append(attention)
            if getattr(attention, "relative_position_bias_table", None) is not None:
                attention._get_rel_pos_bias = _padded(attention._get_rel_pos_bias, count)
                patched.append(attention)
        yield wide
    finally:
        for attention in changed:
            attention.num_prefix_tokens -= count
        for attention in patched:
            del attention._get_rel_pos_bias


def _padded(bias: Any, count: int) -> Callable[[], Tensor]:
    return lambda: F.pad(bias(), (count, 0, count, 0))

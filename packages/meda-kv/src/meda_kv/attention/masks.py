"""Attention masks in the four forms of transformers, read into and written from one boolean form.

A *visible* mask is a bool tensor [B, 1 or H, q, S]: True where a query may look at a slot. ``sdpa`` uses it as it is,
``eager`` adds 0 or the least number of the data type to the scores, ``flex_attention`` wants a ``BlockMask``, and the
flash kernels know only "causal" with padding at the sides, so they can take none of our masks but the trivial one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["read_mask", "write_mask"]


def read_mask(mask: Any, *, batch: int, queries: int, slots: int) -> Tensor | None:
    """Read the mask that a model hands to its attention function.

    Parameters
    ----------
    mask : Tensor, BlockMask or None
        Bool or additive [B, 1 or H, q, S], a two-dimensional padding mask [B, S] of the flash kernels, a flex
        ``BlockMask``, or None.
    batch, queries, slots : int
        B, q and S, needed for a ``BlockMask`` only.

    Returns
    -------
    Tensor or None
        Bool [B, 1 or H, q, S]. None stands for "plain causal": no mask, or a padding mask, which says nothing that the
        valid flags of the slots do not say.

    Raises
    ------
    TypeError
        Another form, or an additive mask with other numbers than 0 and the least ones (a bias).
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 4:
        part = mask[..., :slots]
        if part.dtype == torch.bool:
            return part
        seen = part > torch.finfo(part.dtype).min / 2
        if bool((seen & (part != 0)).any()):
            raise TypeError(
                "unsupported: the model adds a bias to its attention through the mask, which cannot follow compressed "
                "slots; use the ordinary DynamicCache"
            )
        return seen
    if hasattr(mask, "mask_mod"):
        from torch.nn.attention.flex_attention import create_mask

        device = mask.kv_num_blocks.device
        heads = mask.kv_num_blocks.shape[1]
        shown: Tensor = create_mask(mask.mask_mod, batch, heads, queries, slots, device=str(device))
        return shown
    raise TypeError(
        f"attention mask of type {type(mask).__name__} is not supported; pass attention_mask as [B, tokens]"
    )


def write_mask(visible: Tensor | None, *, base: str, dtype: torch.dtype) -> Any:
    """Write a visible mask in the form that an attention implementation takes.

    Parameters
    ----------
    visible : Tensor or None
        Bool [B, 1 or H, q, S]; None, "no mask", is returned as None.
    base : str
        ``"sdpa"``, ``"eager"``, ``"flex_attention"`` or a name that holds ``flash``.
    dtype : torch.dtype
        Of the queries; the additive mask of ``eager`` has it.

    Returns
    -------
    Tensor, BlockMask or None

    Raises
    ------
    RuntimeError
        A flash kernel is asked for a mask that it cannot express.
    """
    if visible is None:
        return None
    if "flash" in base:
        if _plain_causal(visible):
            return None
        raise RuntimeError(
            f"{base} cannot leave out single slots of the compressed cache; use the sdpa attention "
            "(model.set_attn_implementation('sdpa') before the cache is made), or pass one prompt at a time, or batch "
            "prompts of equal length with budgets that are the same for every row (budgets='uniform')"
        )
    if base == "eager":
        zero = torch.zeros((), dtype=dtype, device=visible.device)
        return torch.where(visible, zero, torch.finfo(dtype).min)
    if base == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        batch, heads, queries, slots = visible.shape

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return visible[b, h, q, kv]

        per_head = heads if heads > 1 else None
        if per_head is None:
            shared = visible[:, 0]

            def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
                return shared[b, q, kv]

        return create_block_mask(mask_mod, batch, per_head, queries, slots, device=str(visible.device))
    return visible


def _plain_causal(visible: Tensor) -> bool:
    """Whether a visible mask equals the causal mask aligned at the last query and the last slot."""
    queries, slots = visible.shape[-2:]
    causal = torch.ones(queries, slots, dtype=torch.bool, device=visible.device).tril(slots - queries)
    return bool((visible == causal).all())

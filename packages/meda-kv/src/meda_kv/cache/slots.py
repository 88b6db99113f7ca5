"""Small operations on tensors whose third dimension are the slots of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["blank", "owns_storage", "padded", "roomy", "taker"]


def owns_storage(tensor: Tensor) -> bool:
    """Whether the tensor is all of its storage, so that adopting it keeps nothing else alive."""
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def roomy(old: Tensor | None, used: int, capacity: int, like: Tensor) -> Tensor:
    """Return a new ``[B, Hkv, capacity, D]`` buffer of the kind of `like`, starting with the old one's used slots."""
    rows, heads, _, dim = like.shape
    new = like.new_empty((rows, heads, capacity, dim))
    if old is not None:
        new[:, :, :used] = old[:, :, :used]
    return new


def taker(index: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that gathers ``[B, Hkv, S, ...]`` at ``index [B, Hkv, S']``: whole rows, any strides."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None, None]
    heads = torch.arange(index.shape[1], device=index.device)[None, :, None]

    def take(tensor: Tensor) -> Tensor:
        return tensor[rows, heads, index]

    return take


def padded(tensor: Tensor, slots: int) -> Tensor:
    """Lengthen a slot tensor with zeros for tokens that its observer did not see."""
    if tensor.shape[2] >= slots:
        return tensor
    new = tensor.new_zeros((*tensor.shape[:2], slots, *tensor.shape[3:]))
    new[:, :, : tensor.shape[2]] = tensor
    return new


def blank(tensor: Tensor, missing: Tensor | None) -> Tensor:
    """Set a slot tensor to zero where no token is, bool ``[B, Hkv, S]``."""
    if missing is None:
        return tensor
    return tensor.masked_fill(missing.reshape(missing.shape + (1,) * (tensor.ndim - 3)), 0)

"""Cosine head of FTC (arXiv 2409.16223): logits s * cos(w_c, f), trained as any other head.

That the head starts from the normalised weights of the source head, and the start of s, are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vfm_core.errors import UserError

__all__ = ["CosineHead", "cosine_head_from"]


class CosineHead(nn.Module):
    """z_c = s * cos(w_c, f) (+ b_c).

    Parameters
    ----------
    in_features, out_features : int
        D and K.
    scale : float
        Start of s > 0.
    bias : bool
        Whether there is a bias; training never makes one, a calibration folded into the head does.

    Attributes
    ----------
    weight : Parameter, (K, D)
    scale : Parameter, ()
    bias : Parameter (K,) or None

    Examples
    --------
    >>> CosineHead(8, 3)(torch.ones(2, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 10.0, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.eye(out_features, in_features))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take a bias from a state dict that has one, which a calibrated head does."""
        found = state_dict.get(f"{prefix}bias")
        if self.bias is None and isinstance(found, Tensor):
            self.bias = nn.Parameter(torch.zeros_like(found, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, K)."""
        return F.linear(self.scale * F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1), self.bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def cosine_head_from(head: nn.Module, scale: float) -> CosineHead:
    """Make a cosine head whose directions are those of a source head; its bias has no place and is dropped.

    Parameters
    ----------
    head : nn.Module
        With ``weight`` (K, D): linear, or already a cosine head, which is copied.
    scale : float
        Start of s.

    Raises
    ------
    UserError
        Another kind of head.
    """
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        given = type(head).__name__
        raise UserError("only a linear head becomes a cosine head", given=given, remedy="use another recipe")
    made = CosineHead(weight.shape[1], weight.shape[0], scale).to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(F.normalize(weight, dim=-1))
    return made

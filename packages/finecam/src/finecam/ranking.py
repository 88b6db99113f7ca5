"""Order of a map's pixels, the ground of every metric here: value descending, then pixel index ascending.

The order is stable, so ties never depend on the device or the run. A map that is constant or not finite ranks nothing:
`is_empty` finds it, and the metrics answer NaN for it instead of a number that would mean "top left corner first".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_maps(maps: Tensor) -> None:
    """Raise ``ValueError`` unless ``maps`` is a float tensor (B, H, W)."""
    if maps.ndim != 3 or not maps.is_floating_point():
        raise ValueError(f"maps must be floats (B, H, W), got {maps.dtype} {tuple(maps.shape)}")


def is_empty(maps: Tensor) -> Tensor:
    """Which maps (B, H, W) are constant (all zero included) or hold NaN or infinity; (B,) bool."""
    check_maps(maps)
    flat = maps.flatten(1)
    return ~torch.isfinite(flat).all(1) | (flat == flat[:, :1]).all(1)


def pixel_ranks(maps: Tensor) -> Tensor:
    """Rank of every pixel of (B, H, W) maps, 0 for the highest; (B, H, W) int64."""
    check_maps(maps)
    flat = maps.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(flat.shape[1], device=maps.device).expand_as(order))
    return ranks.view(maps.shape)


def pixel_count(q: float, pixels: int) -> int:
    """Number of pixels in the fraction ``q`` in [0, 1], rounded half up, and at least one when q > 0."""
    if not 0 <= q <= 1:
        raise ValueError(f"a fraction of pixels must lie in [0, 1], got {q}")
    return max(math.floor(q * pixels + 0.5), 1 if q > 0 else 0)


def top_mask(maps: Tensor, q: float) -> Tensor:
    """The top fraction ``q`` of the pixels of each map (B, H, W); bool, the same number in every map."""
    return pixel_ranks(maps) < pixel_count(q, maps.shape[-2] * maps.shape[-1])

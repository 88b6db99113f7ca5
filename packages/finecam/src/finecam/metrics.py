"""How well maps point at what they should, and at each other. All values are per image, (B,).

Localisation follows the usual names: share of the map's energy inside a region (the energy-based pointing game of
Score-CAM, arXiv 1910.01279, and the localisation score of Finer-CAM, arXiv 2501.11309), pointing game
(arXiv 1608.00507), intersection over union of the top pixels, pixel average precision. The perturbation metrics of
`finecam.perturbation` and `finecam.road` can be imported from here too.

Maps (B, h, w) are resized (bilinear) to the region's size. A constant or non-finite map gives NaN, never zero, and so
does an empty region: count such images and leave them out of means.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finecam.families import resize
from finecam.perturbation import (
    DeletionCurves,
    absolute_drop,
    average_drop,
    deletion,
    deletion_curves,
    increase_in_confidence,
    insertion,
    other_classes,
    relative_drop,
)
from finecam.ranking import is_empty, pixel_ranks, top_mask
from finecam.road import road_combined, road_lerf, road_morf

__all__ = [
    "Agreement",
    "DeletionCurves",
    "absolute_drop",
    "agreement",
    "average_drop",
    "average_precision",
    "box_mask",
    "deletion",
    "deletion_curves",
    "energy_in",
    "half_cell",
    "increase_in_confidence",
    "insertion",
    "iou_at",
    "is_empty",
    "other_classes",
    "pearson",
    "pointing",
    "relative_drop",
    "road_combined",
    "road_lerf",
    "road_morf",
    "top_iou",
    "top_mask",
]


def box_mask(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels whose centre lies in a box.

    Parameters
    ----------
    boxes
        (B, 4) as x0, y0, x1, y1 in pixels of an image of ``size``; may be fractional or reach outside.
    size
        (H, W).

    Returns
    -------
    Tensor
        (B, H, W) bool.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (B, 4), got {tuple(boxes.shape)}")
    x0, y0, x1, y1 = (side[:, None] for side in boxes.unbind(1))
    y = torch.arange(size[0], device=boxes.device) + 0.5
    x = torch.arange(size[1], device=boxes.device) + 0.5
    return ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]


def half_cell(grid: tuple[int, int], size: tuple[int, int]) -> float:
    """Half the longer side, in pixels of an image of ``size`` (H, W), of a cell of the feature grid (h, w)."""
    return max(size[0] / grid[0], size[1] / grid[1]) / 2


def energy_in(maps: Tensor, region: Tensor) -> Tensor:
    """Share of a map's energy inside a region: sum of S inside / sum of S.

    Parameters
    ----------
    maps
        (B, h, w); negative values count as zero.
    region
        (B, H, W) bool mask, or (B, 4) boxes in pixels of the maps (see `box_mask`).

    Returns
    -------
    Tensor
        (B,) in [0, 1]; NaN for an empty map or an empty region.
    """
    s, region, empty = _aligned(maps, region)
    energy = s.clamp_min(0).flatten(1).double()
    total = energy.sum(1)
    inside = (energy * region.flatten(1)).sum(1) / total
    return inside.masked_fill(empty | (total <= 0), torch.nan).to(s.dtype)


def pointing(maps: Tensor, region: Tensor, radius: float = 0.0) -> Tensor:
    """Whether the map's highest pixel lies in the region, or within ``radius`` of it.

    Parameters
    ----------
    maps, region
        As in `energy_in`. Of equal highest pixels the first counts.
    radius
        Tolerance in pixels of the region (Euclidean); half a feature cell is customary (`half_cell`).

    Returns
    -------
    Tensor
        (B,) 1 or 0; NaN for an empty map or an empty region.
    """
    if radius < 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    s, region, empty = _aligned(maps, region)
    height, width = s.shape[-2:]
    peak = (pixel_ranks(s) == 0).flatten(1).long().argmax(1)
    dy = torch.arange(height, device=s.device) - (peak // width)[:, None]
    dx = torch.arange(width, device=s.device) - (peak % width)[:, None]
    near = dy[:, :, None] ** 2 + dx[:, None, :] ** 2 <= radius**2
    hit = (near & region).flatten(1).any(1).to(s.dtype)
    return hit.masked_fill(empty, torch.nan)


def iou_at(maps: Tensor, region: Tensor, q: float = 0.05) -> Tensor:
    """Intersection over union of the map's top fraction ``q`` of pixels and the region; (B,), NaN as in `energy_in`."""
    s, region, empty = _aligned(maps, region)
    return _iou(top_mask(s, q), region).to(s.dtype).masked_fill(empty, torch.nan)


def average_precision(maps: Tensor, region: Tensor) -> Tensor:
    """Average precision of the map as a detector of the region's pixels, free of any threshold.

    (B,) in (0, 1]; chance is the region's share of the image. NaN as in `energy_in`.
    """
    s, region, empty = _aligned(maps, region)
    values, order = s.flatten(1).sort(dim=1, descending=True, stable=True)
    truth = region.flatten(1).gather(1, order).double()
    # Equal values are one threshold: each pixel's precision is that at the last pixel of its group of equals.
    pixels = values.shape[1]
    position = torch.arange(pixels, device=s.device).expand_as(order)
    is_last = torch.ones_like(order, dtype=torch.bool)
    is_last[:, :-1] = values[:, 1:] != values[:, :-1]
    last = position.masked_fill(~is_last, pixels - 1).flip(1).cummin(1).values.flip(1)
    precision = truth.cumsum(1).gather(1, last) / (last + 1)
    score = (truth * precision).sum(1) / truth.sum(1)
    return score.to(s.dtype).masked_fill(empty, torch.nan)


class Agreement(NamedTuple):
    """How far two sets of maps agree, per image."""

    pearson: Tensor
    iou: Tensor


def agreement(a: Tensor, b: Tensor, q: float = 0.1) -> Agreement:
    """Pearson correlation, and intersection over union of the two top fractions ``q``, of maps (B, h, w)."""
    return Agreement(pearson(a, b), top_iou(a, b, q))


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of two maps over their pixels; (B,) in [-1, 1], NaN when one is empty."""
    a, b, empty = _pair(a, b)
    x, y = a.flatten(1).double(), b.flatten(1).double()
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    r = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    return r.clamp(-1, 1).to(a.dtype).masked_fill(empty, torch.nan)


def top_iou(a: Tensor, b: Tensor, q: float = 0.1) -> Tensor:
    """Intersection over union of the top fractions ``q`` of two maps; (B,), NaN when one is empty."""
    a, b, empty = _pair(a, b)
    return _iou(top_mask(a, q), top_mask(b, q)).to(a.dtype).masked_fill(empty, torch.nan)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    return (a & b).flatten(1).sum(1).double() / (a | b).flatten(1).sum(1)


def _aligned(maps: Tensor, region: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maps at the region's size, the region as a mask, and which images have nothing to score."""
    empty = is_empty(maps)
    maps = _at_least_float32(maps)
    if region.ndim == 2:
        region = box_mask(region, (maps.shape[-2], maps.shape[-1]))
    if region.ndim != 3 or len(region) != len(maps):
        raise ValueError(f"a region must be masks (B, H, W) or boxes (B, 4) for B = {len(maps)}, got {region.shape}")
    region = region.to(maps.device).bool()
    empty = empty | ~region.flatten(1).any(1)
    return resize(maps, (region.shape[-2], region.shape[-1])), region, empty


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty = is_empty(a) | is_empty(b).to(a.device)
    if len(a) != len(b):
        raise ValueError(f"two sets of maps of one length are compared, got {len(a)} and {len(b)}")
    a, b = _at_least_float32(a), _at_least_float32(b.to(a.device))
    return a, resize(b, (a.shape[-2], a.shape[-1])), empty


def _at_least_float32(maps: Tensor) -> Tensor:
    return maps.detach().to(torch.promote_types(maps.dtype, torch.float32))

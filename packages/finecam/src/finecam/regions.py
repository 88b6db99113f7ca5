"""What maps are scored on: regions as masks at the model's input (what differs, traits, objects), and the metrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from vfm_core.data import ImageDataset
from vfm_core.errors import unknown_name
from vfm_core.preprocess import Preprocess

from finecam import metrics
from finecam.fills import Fill
from finecam.layers import logits_of

__all__ = ["EMPTY", "EXTRAS", "Differences", "Scoring", "located", "regions_of", "score_maps", "to_input_mask"]


EMPTY = "empty"
"""Among an arm's values: 1 where the map itself is empty, which is not the same as a region that is."""

EXTRAS = (
    "absolute_drop", "max_relative_drop", "curve_area", "iou", "average_drop", "increase_in_confidence", "road",
)  # fmt: skip
"""Metrics that are left out unless asked for."""


@dataclass(frozen=True)
class Scoring:
    """What is measured.

    Attributes
    ----------
    fractions : tuple of float
        Fractions q of the pixels that relative drop removes.
    curve_steps : int
        Steps of the deletion and insertion curves; 0 leaves these (by far the dearest) out.
    fill : str
        What removed pixels become, see `finecam.metrics.deletion`.
    radius : float, optional
        Tolerance of the pointing game in pixels; by default half a cell of the coarsest feature grid compared.
    references : int
        T of the look-alikes, and of the region "difference" for maps without references.
    extras : tuple of str
        Further metrics, of `EXTRAS`: absolute drop, relative drop with the largest over all d, area between the
        deletion curves of target and look-alike (Fig. 5), intersection over union of the top 5 % of the pixels, average
        drop, increase in confidence, ROAD.

    Raises
    ------
    UserError
        An unknown extra metric.
    """

    fractions: tuple[float, ...] = (0.01, 0.05, 0.10)
    curve_steps: int = 50
    fill: Fill = "zero"
    radius: float | None = None
    references: int = 3
    extras: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.extras:
            if name not in EXTRAS:
                raise unknown_name("metric", name, EXTRAS)


class Differences:
    """Pixels that truly differ between each image's own class and some others; every pair is rendered only once.

    Parameters
    ----------
    dataset
        Knows ``difference_mask(i, d)``, and better ``difference_masks(indices, classes)`` for many at a time.
    rows
        The B images.
    preprocess, size
        As in `regions_of`.
    """

    def __init__(self, dataset: ImageDataset, rows: Sequence[int], preprocess: Preprocess, size: tuple[int, int]):
        self.dataset, self.rows, self.preprocess, self.size = dataset, list(rows), preprocess, size
        self._masks: dict[tuple[int, int], Tensor] = {}

    @staticmethod
    def known(dataset: ImageDataset) -> bool:
        """Whether a dataset can tell."""
        return hasattr(dataset, "difference_mask")

    def union(self, classes: Tensor) -> Tensor:
        """Pixels that differ from any of the classes (B, T), ids of the dataset, negative = unknown; (B, H, W) bool."""
        pairs = [[(row, d) for d in ds if d >= 0] for row, ds in zip(self.rows, classes.tolist())]
        missing = [pair for pair in dict.fromkeys(itertools.chain(*pairs)) if pair not in self._masks]
        for pair, mask in zip(missing, self._render(missing)):
            self._masks[pair] = to_input_mask(mask, self.preprocess, self.size)
        nothing = to_input_mask(None, self.preprocess, self.size)
        found = [torch.stack([nothing, *(self._masks[pair] for pair in some)]).any(0) for some in pairs]
        return torch.stack(found).to(classes.device)

    def _render(self, pairs: Sequence[tuple[int, int]]) -> Iterable[np.ndarray]:
        differ: Any = self.dataset
        if pairs and hasattr(differ, "difference_masks"):
            return iter(differ.difference_masks(*zip(*pairs)))
        return (differ.difference_mask(row, d) for row, d in pairs)


def regions_of(
    dataset: ImageDataset,
    rows: Sequence[int],
    target: Tensor,
    similar: Tensor,
    preprocess: Preprocess,
    size: tuple[int, int],
    differences: Differences | None = None,
) -> dict[str, Tensor]:
    """Masks of what is known about some images.

    Parameters
    ----------
    dataset
        One that can render an image as another class (tinyworld) knows which pixels differ, see `Differences`;
        annotations ``trait_mask``, ``mask`` and ``box`` are used where present.
    rows
        The B images.
    target, similar
        (B,) classes and (B, T) classes they are told from, ids of the dataset.
    preprocess
        Takes a mask through the same crop as its picture.
    size
        (H, W) of the model's input.
    differences
        Of these rows, to share its masks; made anew otherwise.

    Returns
    -------
    dict of str to Tensor
        "difference" (all pixels in which the image differs from the same one of any similar class), "trait" (the mark
        of its own class) and "object", those of them that at least one image has: (B, H, W) bool, an empty mask where
        an image has none.
    """
    regions: dict[str, Tensor] = {}
    if Differences.known(dataset):
        differences = differences or Differences(dataset, rows, preprocess, size)
        regions["difference"] = differences.union(similar).to(target.device)
    found: dict[str, list[np.ndarray | None]] = {"trait": [], "object": []}
    for row in rows:
        sample = dataset[row]
        found["trait"].append(sample.meta.get("trait_mask"))
        mask, box = sample.meta.get("mask"), sample.meta.get("box")
        if mask is None and box is not None:
            width, height = sample.image.size
            mask = metrics.box_mask(torch.tensor([box], dtype=torch.float64), (height, width))[0].numpy()
        found["object"].append(mask)
    return regions | {
        name: torch.stack([to_input_mask(mask, preprocess, size) for mask in masks]).to(target.device)
        for name, masks in found.items()
        if any(mask is not None for mask in masks)
    }


def to_input_mask(mask: np.ndarray | None, preprocess: Preprocess, size: tuple[int, int]) -> Tensor:
    """A mask over the picture as one over the model's input, (H, W) bool; no mask gives an empty one."""
    if mask is None:
        return torch.zeros(size, dtype=torch.bool)
    if mask.shape == size and preprocess.size == size:
        return torch.from_numpy(np.ascontiguousarray(mask, dtype=bool))
    picture = Image.fromarray(np.repeat(mask.astype(np.uint8)[:, :, None] * 255, 3, axis=2))
    return preprocess.geometry(picture)[0] > 0.5


def score_maps(
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    maps: Tensor,
    regions: Mapping[str, Tensor],
    look_alikes: Mapping[str, Tensor],
    scoring: Scoring,
    curves: list[metrics.DeletionCurves] | None = None,
) -> dict[str, Tensor]:
    """All metrics of one set of maps.

    Parameters
    ----------
    model
        Images (b, 3, H, W) -> logits: the classifier that the maps explain.
    x, target
        (B, 3, H, W) and (B,).
    maps
        (B, h, w).
    regions
        Name -> (B, H, W) bool, see `finecam.regions.regions_of`.
    look_alikes
        Similarity rule -> (B, T) classes; relative drop is taken against the first.
    scoring
        Settings. Without a radius, half a cell of the maps' own grid is the pointing game's, or 1/32 of the longer side
        for maps that were enlarged already.
    curves
        The deletion curves are added to this list where the extra metric "curve_area" asks for them.

    Returns
    -------
    dict of str to Tensor
        Metric -> (B,), NaN for empty maps; "empty" is 1 for these and 0 for others.
    """
    if scoring.radius is None:
        size, grid = (x.shape[-2], x.shape[-1]), (maps.shape[-2], maps.shape[-1])
        radius = metrics.half_cell(grid, size) if grid[0] < size[0] else max(size) / 32
        scoring = replace(scoring, radius=radius)
    found = {EMPTY: metrics.is_empty(maps).float()}
    for name, region in regions.items():
        found |= located(maps, name, region, scoring)
    fractions = list(scoring.fractions)

    def drops(label: str, values: Tensor) -> dict[str, Tensor]:
        return {label.format(f"{q * 100:g}%"): drop for q, drop in zip(fractions, values.unbind(1))}

    for rule, classes in look_alikes.items():
        values = metrics.relative_drop(model, x, maps, target, classes[:, 0], fractions, scoring.fill)
        found |= drops(f"RD@{{}} ({rule})", values)
    if scoring.curve_steps:
        found["deletion"] = metrics.deletion(model, x, maps, target, scoring.curve_steps, scoring.fill)
        found["insertion"] = metrics.insertion(model, x, maps, target, scoring.curve_steps)
    extras = scoring.extras
    if "absolute_drop" in extras:
        found |= drops("AD@{}", metrics.absolute_drop(model, x, maps, target, fractions, scoring.fill))
    if "max_relative_drop" in extras:
        with torch.inference_mode():
            every = metrics.other_classes(target, logits_of(model(x[:1])).shape[1])
        found |= drops("RD@{} (max)", metrics.relative_drop(model, x, maps, target, every, fractions, scoring.fill))
    if "curve_area" in extras:
        nearest = look_alikes["logit"][:, 0]
        curve = metrics.deletion_curves(model, x, maps, target, nearest, scoring.curve_steps or 50, scoring.fill)
        found["curve area"] = curve.area
        if curves is not None:
            curves.append(curve)
    if "average_drop" in extras:
        found["average drop"] = metrics.average_drop(model, x, maps, target)
    if "increase_in_confidence" in extras:
        found["increase in confidence"] = metrics.increase_in_confidence(model, x, maps, target)
    if "road" in extras:
        found["ROAD"] = metrics.road_combined(model, x, maps, target)
    return found


def located(maps: Tensor, name: str, region: Tensor, scoring: Scoring) -> dict[str, Tensor]:
    """Localisation in one region."""
    found = {
        f"energy in {name}": metrics.energy_in(maps, region),
        f"pointing at {name}": metrics.pointing(maps, region, scoring.radius or 0.0),
        f"AP of {name}": metrics.average_precision(maps, region),
    }
    if "iou" in scoring.extras:
        found[f"IoU@5% of {name}"] = metrics.iou_at(maps, region, 0.05)
    return found

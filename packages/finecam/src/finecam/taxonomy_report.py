"""A page of Prompt-CAM along the taxonomy: the same image from order to species (arXiv 2501.09333, section 4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from vfm_core.data import ImageDataset, loader
from vfm_core.errors import UserError
from vfm_core.report import Report

from finecam import render
from finecam.taxonomy import LevelView, TaxonomyKeys

__all__ = ["write_walk"]


def write_walk(
    keys: TaxonomyKeys,
    dataset: ImageDataset,
    out: str | Path,
    *,
    images: int = 24,
    batch_size: int = 16,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Path:
    """Show images to every level of trained keys, from broad to fine, and write ``report.html``.

    Parameters
    ----------
    keys
        Trained prompt sets.
    dataset
        Its first picture of every class is shown, then every second one, ...
    out
        Folder of the page.
    images
        At most so many.
    batch_size, workers, device
        For the pictures.

    Returns
    -------
    Path
        The page.
    """
    first = next(iter(keys.models.values()))
    failed: list[dict[str, Any]] = []

    def note(i: int, image: str, error: UserError) -> None:
        failed.append({"image": image, "reason": str(error)})

    panels = []
    stream = loader(
        dataset,
        first.preprocess,
        batch_size,
        workers,
        device,
        indices=_spread(dataset, images),
        on_error=note,
    )
    for _, x, samples in stream:
        views = keys.walk(x)
        for i, sample in enumerate(samples):
            label = -1 if sample.label is None else sample.label
            caption = f"{sample.id}: {dataset.classes[label]}" if label >= 0 else sample.id
            panels.append((_panel(sample.image, views, i, first.preprocess.box(sample.image.size)), caption))
    levels = " > ".join(keys.taxonomy.levels)
    report = Report("finecam promptcam taxonomy", f"{levels}, {len(keys.models)} prompt sets, {first.backbone.spec}")
    report.heading("Prompt sets")
    report.table(
        [
            {
                "prompts of": " > ".join(unit) or "the root",
                "groups": model.num_classes,
                "validation accuracy": model.metrics.get("accuracy"),
            }
            for unit, model in keys.models.items()
        ]
    )
    report.heading("From broad to fine")
    report.text(
        "One row per image: where the prompt of the predicted group looks (mean over heads), with that group's "
        "probability among its rivals. Nothing is drawn where there is nothing to tell apart."
    )
    report.gallery(panels)
    if failed:
        report.heading("Failed images")
        report.table(failed)
    return report.write(Path(out) / "report.html")


def _spread(dataset: ImageDataset, count: int) -> list[int]:
    """Positions of at most `count` pictures, spread over the classes."""
    rank = np.zeros(len(dataset), np.int64)
    for label in np.unique(dataset.labels):
        own = np.flatnonzero(np.asarray(dataset.labels) == label)
        rank[own] = np.arange(len(own))
    return sorted(np.lexsort((np.arange(len(dataset)), rank))[:count].tolist())


def _panel(image: Image.Image, views: list[LevelView], i: int, box: render.Box) -> Image.Image:
    picture = image.resize(render.fit_within(image.size, 320), reducing_gap=2.0)
    tiles = [(picture, "image")]
    for view in views:
        values = view.maps[i].numpy()
        shown = picture
        if np.isfinite(values).all():
            placed = render.to_original(render.minmax(values), box, image.size, (picture.height, picture.width))
            shown = render.overlay(picture, placed)
        tiles.append((shown, f"{view.level}: {view.groups[i]} ({float(view.probability[i]):.2f})"))
    return render.panel(tiles)

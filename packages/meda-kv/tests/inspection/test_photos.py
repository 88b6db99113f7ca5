"""Photographs through the grids of two families, and drawn pictures where no photographs are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from meda_kv.inspection import collect
from meda_kv.inspection.sheets import _columns, kept_sheet
from meda_kv.prompts import Prompt, load_images
from PIL import Image
from processor_zoo import tiny_processor
from zoo import tiny_vlm


def _panels(sheet: np.ndarray, size: tuple[int, int], count: int) -> list[np.ndarray]:
    """The panels of a sheet of one view, cut out at their places."""
    columns = _columns(count)
    width = (960 - (max(columns, 3) + 1) * 14) // max(columns, 3)
    height = max(8, min(2 * width, round(width * size[1] / size[0])))
    found = []
    for i in range(count):
        x, y = 14 + i % columns * (width + 14), 28 + 34 + 34 + i // columns * (height + 34 + 14)
        found.append(sheet[y : y + height, x : x + width].astype(float))
    return found


PHOTOS = Path(__file__).resolve().parents[4].parent / "shared" / "data" / "birds"


def _pictures() -> list[Image.Image]:
    """Two photographs; where none are at hand, two drawn ones of unlike shapes, so that the test is never left out."""
    files = sorted(PHOTOS.glob("*.jpg"))[:2] if PHOTOS.is_dir() else []
    if len(files) == 2:
        return load_images(files)
    drawn = []
    for width, height in ((320, 240), (210, 300)):
        y, x = np.mgrid[:height, :width]
        waves = [127 + 120 * np.sin(x / a) * np.cos(y / b) for a, b in ((17, 29), (41, 13), (23, 37))]
        drawn.append(Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)))
    return drawn


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_photographs_are_mapped(family: str) -> None:
    photos = _pictures()
    model, _ = tiny_vlm(family)
    found = collect(
        model,
        tiny_processor(family),
        Prompt("w1 <image> w2 <image> w3 " + "w4 " * 16, photos),
        method="snapkv",
        ratio=0.4,
        text_ratios=(),
        max_new_tokens=2,
        cache_options={"floor": 4},
    )
    assert all(image.mapped for image in found.images)
    assert sum(found.budgets) == found.total
    for index, photo in enumerate(photos):
        sheet = np.asarray(kept_sheet(found, index))
        assert sheet.shape[0] > 50
        # What no head kept is faded to the light ground: the fading, pixel by pixel, is the share that was dropped.
        view = found.images[index].views[0]  # whose panels come first
        share = found.share[:, view.tokens[view.tokens >= 0].numpy()].mean(axis=1)
        panels = _panels(sheet, photo.size, len(found.layers) + 1)
        room = 239.6 - panels[0]
        for layer, panel in enumerate(panels[1:]):
            fading = ((panel - panels[0]) / np.where(np.abs(room) > 20, room, np.nan)).clip(0, 1)
            assert abs(np.nanmean(fading) - 0.85 * (1 - share[layer])) < 0.2, layer
        assert found.pictures[index].size == photo.size

"""Contact sheets: birds beside their ground truth, as one PNG."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from tinyworld.birds import Birds

_TINT = {"mark": (255, 40, 150), "shared": (255, 190, 30), "object": (70, 130, 255), "cue": (30, 220, 120)}
_GAP, _LINE = 4, 12


def contact_sheet(birds: Birds, n: int = 16, columns: int = 4, masks: bool = True, zoom: int = 3) -> Image.Image:
    """Draw the first n birds with their class names; with `masks`, each beside its ground truth.

    The truth picture dims the background, tints the bird blue, its own mark pink, marks shared by its genus amber and
    a spurious disc green.

    Parameters
    ----------
    birds : Birds
        What to show.
    n : int
        Number of birds, cut to the length of the set.
    columns : int
        Birds per row.
    masks : bool
        Show the ground truth too.
    zoom : int
        Screen pixels per pixel.

    Returns
    -------
    PIL.Image.Image
        RGB.
    """
    n = min(n, len(birds))
    columns = min(columns, n)
    side = birds.size * zoom
    width = side * (2 if masks else 1) + _GAP
    height = side + _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, -(-n // columns) * height + _GAP), (250, 250, 248))
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(birds.images(range(n))):
        left, top = (i % columns) * width + _GAP, (i // columns) * height + _GAP
        for k, tile in enumerate([picture, _truth(birds, i, picture)] if masks else [picture]):
            enlarged = Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + k * side, top + _LINE))
        pen.text((left, top - 1), birds.classes[birds.labels[i]], fill=(40, 40, 45))
    return sheet


def _truth(birds: Birds, i: int, picture: np.ndarray) -> np.ndarray:
    grey = picture.mean(axis=-1, keepdims=True)
    tile = np.repeat(200 + 0.2 * grey, 3, axis=-1)
    layers = (
        ("object", birds.object_mask(i), 0.55),
        ("shared", birds.shared_mask(i), 0.9),
        ("mark", birds.trait_mask(i), 0.95),
        ("cue", birds.cue_mask(i), 0.9),
    )
    for name, mask, strength in layers:
        tile[mask] = (1 - strength) * grey[mask] + strength * np.array(_TINT[name])
    return np.clip(tile, 0, 255).astype(np.uint8)

"""How fast the renderer is: images per second on one core, by image size and by batch size."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tinyworld.birds import Birds

TARGET = 1000.0
"""Images per second at 48 pixels on one core that the renderer aims at."""


def render_speed(size: int, batch: int = 128, masks: bool = False, repeats: int = 3) -> float:
    """Median images per CPU second.

    Parameters
    ----------
    size : int
        Side in pixels.
    batch : int
        Images per call.
    masks : bool
        Also render the images as the next class, as difference masks need it.
    repeats : int
        Timed calls, each on birds not rendered before.
    """
    birds = Birds(n=batch * (repeats + 1), size=size)
    rates = []
    for k in range(repeats + 1):
        rows = range(k * batch, (k + 1) * batch)
        start = time.process_time()
        if masks:
            birds.difference_masks(rows, [(c + 1) % len(birds.classes) for c in birds.labels[list(rows)]])
        else:
            birds.images(rows)
        rates.append(batch / (time.process_time() - start))
    return float(np.median(rates[1:]))  # the first call warms caches


def bench(repeats: int = 3) -> list[dict[str, Any]]:
    """Rows for a table: what, size, batch, images per CPU second, microseconds per image."""
    cases = [(48, 128, False), (64, 128, False), (96, 128, False), (64, 16, False), (64, 1, False), (64, 128, True)]
    rows = []
    for size, batch, masks in cases:
        rate = render_speed(size, batch, masks, repeats if batch > 1 else 10 * repeats)
        what = "difference masks" if masks else "images"
        rows.append(
            {
                "what": what,
                "size": size,
                "batch": batch,
                "images per CPU second": round(rate),
                "microseconds each": round(1e6 / rate),
            }
        )
    return rows

"""A picture of each reference class, to stand beside the image (the panels of Finer-CAM, arXiv 2501.11309)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from vfm_core.errors import UserError

from finecam.products import store_picture
from finecam.render import fit_within
from finecam.targets import match_classes

if TYPE_CHECKING:
    from PIL.Image import Image
    from vfm_core.data import ImageDataset

    from finecam.classifiers import Classifier

log = logging.getLogger(__name__)
TRIES = 5  # unreadable candidates before a class goes without a picture


class ExamplePictures:
    """One labelled picture per model class, read on first use and stored once below ``gallery/examples/``.

    Parameters
    ----------
    dataset
        Labelled pictures; classes are matched to the model's by exact name or `class_map`.
    classifier
        The model.
    class_map
        Data class name to model class name.
    out
        The run folder.
    side
        Longest side of the stored pictures.
    """

    def __init__(
        self, dataset: ImageDataset, classifier: Classifier, class_map: Mapping[str, str], out: Path, side: int
    ) -> None:
        self.dataset, self.out, self.side = dataset, out, side
        known = {k: v for k, v in class_map.items() if k in dataset.classes}
        self.labels = {c: i for i, c in enumerate(match_classes(dataset.classes, classifier, known)) if c is not None}
        self._found: dict[str, tuple[Image, str, str] | None] = {}
        self._lock = threading.Lock()

    def of(self, c: int, image: str) -> tuple[Image, str] | None:
        """(picture, stored path relative to the run folder) of model class `c`; None when the data shows none.

        Always the first readable one, whatever the order of the calls; the second where the first is `image` itself.
        """
        with self._lock:  # several encoder threads may ask for the same class at once
            found = self._first(c, f"{c}", "")
            if found is not None and found[2] == image:
                found = self._first(c, f"{c}-other", image)
        return None if found is None else found[:2]

    def _first(self, c: int, name: str, besides: str) -> tuple[Image, str, str] | None:
        if name not in self._found:
            self._found[name] = self._find(c, name, besides)
        return self._found[name]

    def _find(self, c: int, name: str, besides: str) -> tuple[Image, str, str] | None:
        if c not in self.labels:
            return None
        candidates = np.flatnonzero(np.asarray(self.dataset.labels) == self.labels[c])
        for i in [int(i) for i in candidates if self.dataset.ids[int(i)] != besides][:TRIES]:
            try:
                picture = self.dataset[i].image
            except UserError as e:
                log.warning("no example picture from %s: %s", self.dataset.ids[i], e)
                continue
            picture = picture.resize(fit_within(picture.size, self.side), reducing_gap=2.0)
            path = f"gallery/examples/{name}.webp"
            store_picture(self.out / path, picture)
            return picture, path, self.dataset.ids[i]
        return None

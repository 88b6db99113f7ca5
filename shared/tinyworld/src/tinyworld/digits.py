"""Real handwriting: the 1,797 digits that come with scikit-learn, as an `ImageDataset` (reality check, no download).

Source: UCI "Optical recognition of handwritten digits" (Alpaydin and Kaynak 1998), 8x8 grey values, enlarged here.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image
from vfm_core.data import ImageDataset
from vfm_core.errors import UserError, unknown_name

SPLITS = ("train", "val", "test")
_TURN = {"train": (0, 1, 2), "val": (3,), "test": (4,)}  # position modulo 5: 60%, 20%, 20%


class Digits(ImageDataset):
    """Handwritten digits, white on black, RGB.

    Parameters
    ----------
    split : {"train", "val", "test"}
        Every fifth digit is for validation and every fifth for the test.
    size : int
        Side in pixels, 8 or more (bicubic enlargement of 8x8).
    n : int, optional
        Only the first n of the split.

    Raises
    ------
    UserError
        An option out of range.

    Examples
    --------
    >>> digits = Digits(split="val", n=10)
    >>> digits[0].image.size, digits.classes[3]
    ((64, 64), '3')
    """

    def __init__(self, split: str = "train", size: int = 64, n: int | None = None) -> None:
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        if not 8 <= size <= 512:
            raise UserError("image size out of range", given=size, remedy="give 8 to 512 pixels")
        images, target = _collection()
        rows = np.flatnonzero(np.isin(np.arange(len(target)) % 5, _TURN[split]))
        if n is not None and not 1 <= n <= len(rows):
            raise UserError("number of digits out of range", given=n, remedy=f"{split} has 1 to {len(rows)}")
        rows = rows[:n]
        self.size, self.split = size, split
        self._grey = np.clip(np.round(images[rows] * (255 / 16)), 0, 255).astype(np.uint8)
        classes = [str(digit) for digit in range(10)]
        super().__init__(f"digits-{split}", [f"digit-{row:04d}" for row in rows], target[rows], classes)

    def read(self, i: int) -> Image.Image:
        """Picture i as RGB."""
        small = Image.fromarray(self._grey[i])
        return small.resize((self.size, self.size), Image.Resampling.BICUBIC).convert("RGB")

    def identity(self) -> bytes:
        """Size and grey values."""
        return f"digits {self.size} ".encode() + super().identity() + self._grey.tobytes()


@cache
def _collection() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    everything = load_digits()
    return everything.images, everything.target

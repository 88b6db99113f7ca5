"""Dense attribute prediction: the pretext task of ``tiny:vit`` and ``tiny:vit-fair``.

Every patch token says, by independent logistic outputs, which body parts, mark attributes and body colour its patch
shows; the CLS token says which mark attributes and body colour the image shows. With the downstream marks as attributes
the backbone has seen the factors of the classes (``vit``); with separate positions and colours, worn in random sets, it
has not seen the classes' combinations (``vit-fair``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyworld.bird_body import COLOURS, GENERA, PARTS, SLOTS, Mark
from tinyworld.birds import portray
from tinyworld.species import Species, all_marks
from tinyworld.training import random_mark_sets, random_species, to_input

_PART_PIXELS, _MARK_PIXELS = 6, 3
"""A patch shows a part from this many of its 64 pixels on; a mark covers only about 40 pixels in all."""

POSITIVE_WEIGHT = 3.0
MARK_WEIGHT = 10.0
"""Weight of positives: a given mark is on one patch in 500."""

Attributes = Callable[[Mark], list[int]]


def mark_attributes(mark: Mark) -> list[int]:
    """One attribute per downstream mark (16), then one per position (9) and one per colour (6)."""
    return [_MARKS.index(mark), *(len(_MARKS) + one for one in slot_and_colour(mark))]


def slot_and_colour(mark: Mark) -> list[int]:
    """One attribute per position (9) and one per colour (6), each on its own."""
    return [_SLOTS.index(mark.slot), len(_SLOTS) + _COLOURS.index(mark.colour)]


_MARKS, _SLOTS, _COLOURS = all_marks(), list(SLOTS), list(COLOURS)


@dataclass(frozen=True)
class Pretext:
    """A choice of birds and of mark attributes.

    Attributes
    ----------
    attributes : callable
        Mark -> indices of its attributes.
    count : int
        Number of mark attributes.
    mark_sets : bool
        Birds with 0 to 3 marks of any colour and position, instead of one of the sixteen marks or none.
    """

    attributes: Attributes
    count: int
    mark_sets: bool

    @property
    def image_labels(self) -> int:
        """Length of the CLS target."""
        return self.count + len(GENERA)

    @property
    def patch_labels(self) -> int:
        """Length of a patch target."""
        return len(PARTS) + self.image_labels

    def species(self, key: int, index: np.ndarray) -> list[Species]:
        """The birds of a batch."""
        if self.mark_sets:
            return random_mark_sets(key, index, _COLOURS, _SLOTS)
        return random_species(key, index, _MARKS, none=0.1)

    def batch(self, key: int, index: np.ndarray, size: int, patch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (n, 3, size, size), patch targets (n, M, patch_labels) and CLS targets (n, image_labels)."""
        species = self.species(key, index)
        images, ids = portray(key, index, species, size, ("part", "mark", "object"))
        n, grid = len(index), size // patch
        genus = np.array([list(GENERA).index(one.genus) for one in species])
        image = np.zeros((n, self.image_labels), dtype=np.float32)
        image[np.arange(n), self.count + genus] = 1
        patches = np.zeros((n, grid * grid, self.patch_labels), dtype=np.float32)
        for k in range(len(PARTS)):
            patches[:, :, k] = _count(ids["part"] == k + 1, patch) >= _PART_PIXELS
        bird = _count(ids["object"] > 0, patch) >= _PART_PIXELS
        patches[np.arange(n), :, len(PARTS) + self.count + genus] = bird
        for rank in range(max(len(one.marks) for one in species)):
            worn = [one.marks[rank] if rank < len(one.marks) else None for one in species]
            shown = _count(ids["mark"] == rank + 1, patch) >= _MARK_PIXELS
            for row, mark in enumerate(worn):
                for attribute in self.attributes(mark) if mark else ():
                    column = len(PARTS) + attribute
                    patches[row, :, column] = np.maximum(patches[row, :, column], shown[row])
                    image[row, attribute] = 1
        return to_input(images), torch.from_numpy(patches), torch.from_numpy(image)


PRETEXTS: dict[str, Pretext] = {
    "vit": Pretext(mark_attributes, len(_MARKS) + len(_SLOTS) + len(_COLOURS), mark_sets=False),
    "vit-fair": Pretext(slot_and_colour, len(_SLOTS) + len(_COLOURS), mark_sets=True),
}
"""By name of the model."""


class PretextModel(nn.Module):
    """A timm VisionTransformer with one linear output for patch tokens and one for CLS, both after the final norm."""

    def __init__(self, vit: nn.Module, pretext: Pretext, dim: int) -> None:
        super().__init__()
        self.vit = vit
        self.patch_head = nn.Linear(dim, pretext.patch_labels)
        self.image_head = nn.Linear(dim, pretext.image_labels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patch logits (B, M, patch_labels) and image logits (B, image_labels)."""
        tokens = self.vit.forward_features(x)  # type: ignore[operator]
        return self.patch_head(tokens[:, 1:]), self.image_head(tokens[:, 0])


def pretext_loss(model: nn.Module, x: Tensor, patches: Tensor, image: Tensor) -> Tensor:
    """Sum of the two mean binary cross-entropies, rare positives weighing more."""
    patch_logits, image_logits = model(x)
    marks = slice(len(PARTS), patches.shape[-1] - len(GENERA))
    weight = torch.full(patches.shape[-1:], POSITIVE_WEIGHT)
    weight[marks] = MARK_WEIGHT
    dense = F.binary_cross_entropy_with_logits(patch_logits, patches, pos_weight=weight)
    whole = F.binary_cross_entropy_with_logits(image_logits, image, pos_weight=torch.tensor(POSITIVE_WEIGHT))
    return dense + whole


def _count(mask: np.ndarray, patch: int) -> np.ndarray:
    """Number of set pixels per patch, row-major, (n, M)."""
    n, height, width = mask.shape
    blocks = mask.reshape(n, height // patch, patch, width // patch, patch)
    counts: np.ndarray = blocks.sum(axis=(2, 4), dtype=np.int64).reshape(n, -1)
    return counts

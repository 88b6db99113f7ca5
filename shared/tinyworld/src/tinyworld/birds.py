"""Procedural birds with complete ground truth: the fine-grained classification world.

Four genera (body colours) times four marks give sixteen species; siblings differ in nothing but one small mark
(about 1% of the pixels, on a bird that fills about 18%). Because every picture can be re-rendered as any other
species, the exact set of pixels that tells class c from class d is known, which no photograph offers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image
from vfm_core.data import ImageDataset
from vfm_core.errors import UserError, unknown_name

from tinyworld.bird_body import CUES, GENERA, PARTS, Mark, Pose, bird_layers, surroundings
from tinyworld.draws import Draws, key_of
from tinyworld.render import paint, to_uint8
from tinyworld.species import Species, parse_mark, species_of

SPLITS = ("train", "val", "test")
RENDERER = 1
"""Version of the pictures: raised when the same seed gives other pixels, so that caches notice."""

_GENUS_ORDER = list(GENERA)
_MAPS = ("part", "mark", "object", "cue")
_GRAIN = 0.03 / 0.408  # pixel noise of standard deviation 0.03

Relation = Literal["same", "sibling", "same mark", "other"]


@dataclass(frozen=True)
class _Truth:
    index: int
    image: np.ndarray  # uint8 (size, size, 3)
    ids: dict[str, np.ndarray]  # uint8 (size, size) each
    changes: dict[tuple[Species, tuple[Mark, ...]], np.ndarray]  # what marks beyond the common ones change


def portray(
    key: int,
    index: np.ndarray,
    species: Sequence[Species | None],
    size: int = 64,
    maps: Sequence[str] = (),
    cue: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Render birds: the same key and index always give the same pose, light and background, whatever the species.

    Parameters
    ----------
    key : int
        World key, from `tinyworld.draws.key_of`.
    index : ndarray of int, shape (n,)
        Image numbers.
    species : sequence of n Species or None
        What each bird wears; need not belong to any layout. None = an empty branch.
    size : int
        Side in pixels.
    maps : sequence of {"part", "mark", "object", "cue"}
        Id maps to return: position in `PARTS` plus one; 1 = the first of the bird's marks, 2 = its other marks;
        1 = bird; 1 = spurious disc.
    cue : ndarray, shape (n, 3), optional
        Colour of the spurious disc.

    Returns
    -------
    images : ndarray of uint8, shape (n, size, size, 3)
    ids : dict of str to ndarray of uint8, shape (n, size, size)
    """
    draws = Draws(key, index)
    pose = Pose.draw(draws, size)
    canvas, layers = surroundings(draws, size, pose, cue)
    genus = np.array([_GENUS_ORDER.index(one.genus) if one else 0 for one in species])
    birds = bird_layers(pose, genus, [one.marks if one else () for one in species])
    present = np.array([one is not None for one in species])
    if not present.all():
        seen = [present if one.visible is None else one.visible & present for one in birds]
        birds = [replace(one, visible=visible) for one, visible in zip(birds, seen)]
    painted = paint(canvas, layers + birds, maps)
    grain = np.moveaxis(draws.grain("grain", (3, size, size)), 1, 0)
    return to_uint8(painted.canvas + grain * np.float32(_GRAIN)), painted.ids


class Birds(ImageDataset):
    """Birds of sixteen species, rendered on demand; image *i* depends only on (seed, split, i) and the options.

    Parameters
    ----------
    n : int
        Number of images. Labels cycle through the classes, so any prefix is balanced.
    layout : {"nested", "factorial"}
        Every genus has its own four marks, or all share the same four (see `tinyworld.species`).
    split : {"train", "val", "test"}
        Disjoint streams of birds.
    seed : int
        World seed.
    size : int
        Side in pixels, 32 to 512; 48, 64 and 96 are the usual ones.
    shared_marks : int
        Distractor marks that all species of a genus wear, 0 to 3.
    spurious : float
        A disc appears near a corner of every image; in the split "train" its colour gives the species within its
        genus away with this probability, otherwise (and in the other splits) its colour is random. 0 = no disc.
    plain : bool
        Add a fifth species without a mark to every genus.

    Attributes
    ----------
    species : list of Species
        One per class, in class order.
    labels : ndarray of int64, shape (n,)
        Class of every image.

    Raises
    ------
    UserError
        An option out of range.

    Examples
    --------
    >>> birds = Birds(n=4, split="val")
    >>> birds.classes[0], birds.images([0, 1]).shape
    ('blue bird with red wing patch', (2, 64, 64, 3))
    >>> bool(birds.difference_mask(0, birds.siblings(0)[0]).any())
    True
    """

    def __init__(
        self,
        n: int = 320,
        layout: str = "nested",
        split: str = "train",
        seed: int = 0,
        size: int = 64,
        shared_marks: int = 0,
        spurious: float = 0.0,
        plain: bool = False,
    ) -> None:
        if n < 1:
            raise UserError("number of birds must be positive", given=n, remedy="give n=1 or more")
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        if not 32 <= size <= 512:
            raise UserError("image size out of range", given=size, remedy="give 32 to 512 pixels")
        if not 0 <= spurious <= 1:
            raise UserError("spurious is a probability", given=spurious, remedy="give a number from 0 to 1")
        self.layout, self.split, self.seed, self.size = layout, split, seed, size
        self.shared_marks, self.spurious, self.plain = shared_marks, spurious, plain
        self.species = species_of(layout, shared_marks, plain)
        self._key = key_of("birds", split, seed)
        self._last: _Truth | None = None
        classes = [str(one) for one in self.species]
        labels = np.arange(n, dtype=np.int64) % len(classes)
        ids = [f"{split}-{seed}-{i:06d}" for i in range(n)]
        super().__init__(f"birds-{layout}-{split}", ids, labels, classes)

    def read(self, i: int) -> Image.Image:
        """Picture i as RGB."""
        return Image.fromarray(self._truth(i).image)

    def annotate(self, i: int, image: Image.Image) -> dict[str, Any]:
        """Ground truth of picture i: object mask and box, trait mask, part masks and part centres (x, y)."""
        mask, parts = self.object_mask(i), self.part_masks(i)
        centres = {name: _centre(one) for name, one in parts.items() if one.any()}
        return {
            "mask": mask,
            "box": _box(mask),
            "trait_mask": self.trait_mask(i),
            "part_masks": parts,
            "parts": centres,
        }

    def meta_of(self, index: int) -> dict[str, Any]:
        """What is known without rendering: class, genus, mark (None for a plain bird) and caption."""
        one = self.species[self.labels[self._position(index)]]
        mark = str(one.mark) if one.mark else None
        return {"class": str(one), "genus": one.genus, "mark": mark, "caption": one.caption}

    def identity(self) -> bytes:
        """Options and the renderer's version: they fix every pixel."""
        options = (RENDERER, len(self), self.layout, self.split, self.seed, self.size)
        return repr(("birds", *options, self.shared_marks, self.spurious, self.plain)).encode()

    @property
    def captions(self) -> list[str]:
        """One sentence per class, e.g. "a blue bird with a red wing patch"."""
        return [one.caption for one in self.species]

    @property
    def taxonomy(self) -> list[dict[str, str]]:
        """One row per class: species, genus, mark ("" for a plain bird)."""
        return [
            {"species": str(one), "genus": f"{one.genus} bird", "mark": str(one.mark or "")} for one in self.species
        ]

    def siblings(self, c: int) -> list[int]:
        """The other classes of c's genus."""
        genus = self.species[c].genus
        return [d for d, one in enumerate(self.species) if one.genus == genus and d != c]

    def relation(self, c: int, d: int) -> Relation:
        """How two classes are related: "sibling" = same genus, "same mark" = other genus with the same mark."""
        one, other = self.species[c], self.species[d]
        if c == d:
            return "same"
        if one.genus == other.genus:
            return "sibling"
        return "same mark" if one.mark == other.mark else "other"

    def images(self, indices: Iterable[int], classes: Iterable[int] | int | None = None) -> np.ndarray:
        """Render images.

        Parameters
        ----------
        indices : iterable of int
            Which images.
        classes : int or iterable of int, optional
            Render as these classes instead of the true ones: same pose, light and background, other plumage.

        Returns
        -------
        ndarray of uint8, shape (n, size, size, 3)
        """
        index = np.array([self._position(i) for i in indices], dtype=np.int64)
        return self._render(index, [self.species[c] for c in self._as_classes(index, classes)])[0]

    def edit(self, i: int, mark: str | Mark | int | None) -> np.ndarray:
        """Image i with another mark on the same bird (trait manipulation).

        Parameters
        ----------
        i : int
            Image.
        mark : str, Mark, int or None
            "red wing patch" or any other colour and position, the mark of a class (int), or None for no mark.
            Marks shared by the genus stay, unless the new mark takes their place.

        Returns
        -------
        ndarray of uint8, shape (size, size, 3)
        """
        i = self._position(i)
        if isinstance(mark, int):
            new = self.species[mark].mark
        else:
            new = parse_mark(mark) if isinstance(mark, str) else mark
        old = self.species[self.labels[i]]
        shared = tuple(one for one in old.shared if new is None or one.slot != new.slot)
        return self._render(np.array([i]), [Species(old.genus, new, shared)])[0][0]

    def trait_mask(self, i: int) -> np.ndarray:
        """Pixels of the species' own mark (at least half covered), bool (size, size); empty for a plain bird."""
        return self._truth(i).ids["mark"] == 1 if self.species[self.labels[i]].mark else self._nothing()

    def shared_mask(self, i: int) -> np.ndarray:
        """Pixels of the marks that the whole genus wears, bool (size, size)."""
        ids = self._truth(i).ids["mark"]
        return ids == 2 if self.species[self.labels[i]].mark else ids > 0

    def object_mask(self, i: int) -> np.ndarray:
        """Pixels of the bird, bool (size, size)."""
        return self._truth(i).ids["object"] > 0

    def cue_mask(self, i: int) -> np.ndarray:
        """Visible pixels of the spurious disc, bool (size, size)."""
        return self._truth(i).ids["cue"] > 0

    def part_masks(self, i: int) -> dict[str, np.ndarray]:
        """Visible pixels of every body part, name -> bool (size, size); a mark belongs to the part that carries it."""
        ids = self._truth(i).ids["part"]
        return {name: ids == k + 1 for k, name in enumerate(PARTS)}

    def difference_mask(self, i: int, d: int) -> np.ndarray:
        """Pixels that change when image i is rendered as class d, bool (size, size)."""
        return self.difference_masks([i], d)[0]

    def difference_masks(self, indices: Sequence[int], d: int | Sequence[int]) -> np.ndarray:
        """`difference_mask` for many images in one pass, bool (n, size, size)."""
        changed: np.ndarray = (self.images(indices) != self.images(indices, d)).any(axis=-1)
        return changed

    def presence_mask(self, i: int, d: int) -> np.ndarray:
        """Pixels of the marks that the true class has and d lacks, bool (size, size): evidence by presence."""
        return self._marks_beyond(i, self.labels[i], d)

    def absence_mask(self, i: int, d: int) -> np.ndarray:
        """Pixels where d's marks would be, of those that the true class lacks: evidence by absence."""
        return self._marks_beyond(i, d, self.labels[i])

    def _marks_beyond(self, i: int, has: int, lacks: int) -> np.ndarray:
        """Pixels that the marks of class `has` change, beyond those that class `lacks` wears too."""
        wearer = self.species[has]
        common = tuple(one for one in wearer.marks if one in self.species[lacks].marks)
        known = self._truth(i).changes
        if (wearer, common) not in known:  # siblings ask for the same pixels again and again
            i = self._position(i)
            pixels = self._render(np.array([i, i]), [wearer, Species(wearer.genus, None, common)])[0]
            known[wearer, common] = (pixels[0] != pixels[1]).any(axis=-1)
        return known[wearer, common].copy()

    def _as_classes(self, index: np.ndarray, classes: Iterable[int] | int | None) -> list[int]:
        if classes is None:
            return [int(c) for c in self.labels[index]]
        wanted = [int(classes)] * len(index) if isinstance(classes, int | np.integer) else [int(c) for c in classes]
        if len(wanted) != len(index):
            raise UserError("one class per image expected", given=f"{len(wanted)} for {len(index)} images")
        bad = [c for c in wanted if not 0 <= c < len(self.classes)]
        if bad:
            raise UserError("no such class", given=bad[0], remedy=f"give 0 to {len(self.classes) - 1}")
        return wanted

    def _render(
        self, index: np.ndarray, species: Sequence[Species], maps: Sequence[str] = ()
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        cue = self._cue_colours(index) if self.spurious > 0 else None
        return portray(self._key, index, species, self.size, maps, cue)

    def _cue_colours(self, index: np.ndarray) -> np.ndarray:
        draws = Draws(self._key, index)
        per_genus = len(self.species) // len(GENERA)
        telling = self.labels[index] % per_genus
        told = draws.coin("cue tells", self.spurious) & (self.split == "train")
        kind = np.where(told, telling, draws.integers("cue colour", per_genus)[:, 0])
        colours: np.ndarray = np.array(list(CUES.values()))[kind]
        return colours

    def _truth(self, i: int) -> _Truth:
        """Image and id maps of image i; the last one is kept, as callers ask for several masks in a row."""
        i = self._position(i)
        last = self._last
        if last is None or last.index != i:
            images, ids = self._render(np.array([i]), [self.species[self.labels[i]]], _MAPS)
            last = self._last = _Truth(i, images[0], {name: maps[0] for name, maps in ids.items()}, {})
        return last

    def _nothing(self) -> np.ndarray:
        return np.zeros((self.size, self.size), dtype=bool)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    ys, xs = np.nonzero(mask)
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def _centre(mask: np.ndarray) -> tuple[float, float]:
    ys, xs = np.nonzero(mask)
    return float(xs.mean() + 0.5), float(ys.mean() + 0.5)

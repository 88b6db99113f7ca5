"""Glyphs in two drawing styles: one set of classes, two domains, for studies of adaptation to a new domain.

Every class is a figure of four strokes. The ``source`` domain draws them solid on plain paper, the ``target`` domain
turns and shears every figure, draws outlines and puts a mottled background behind them. The change is the same for all
classes unless `own_shift` says otherwise: then the second half of the classes is turned the other way, so that what is
learned of the new domain from the first half does not help with the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from vfm_core.data import ImageDataset
from vfm_core.errors import UserError, unknown_name

from tinyworld.draws import Draws, key_of

DOMAINS = ("source", "target")
SPLITS = ("train", "val", "test")
STROKES = 4
_LOW, _HIGH = -1.0, 2.0  # range of ink that 8 bits stand for


class Glyphs(ImageDataset):
    """Figures of four strokes, grey as RGB.

    Parameters
    ----------
    n : int
        Pictures per class.
    domain : {"source", "target"}
        Drawing style.
    split : {"train", "val", "test"}
        Splits never share a picture.
    seed : int
        Of the classes' figures and of the pictures.
    classes : int
        Number of classes.
    size : int
        Side in pixels, 8 to 128.
    own_shift : bool
        In the target domain, turn and shear the second half of the classes the other way.

    Raises
    ------
    UserError
        An option out of range.

    Examples
    --------
    >>> glyphs = Glyphs(n=3, domain="target", split="test")
    >>> len(glyphs), glyphs[0].image.size, glyphs.classes[0]
    (60, (16, 16), 'g00')
    """

    def __init__(
        self,
        n: int = 50,
        domain: str = "source",
        split: str = "train",
        seed: int = 0,
        classes: int = 20,
        size: int = 16,
        own_shift: bool = False,
    ) -> None:
        for kind, value, known in (("domain", domain, DOMAINS), ("split", split, SPLITS)):
            if value not in known:
                raise unknown_name(kind, value, known, where="tinyworld:glyphs")
        for what, number, low, high in (("n", n, 1, 10**6), ("classes", classes, 2, 1000), ("size", size, 8, 128)):
            if not low <= number <= high:
                remedy = f"give {low} to {high}"
                raise UserError(f"{what} out of range", where="tinyworld:glyphs", given=number, remedy=remedy)
        self.domain, self.split, self.seed, self.size, self.own_shift = domain, split, seed, size, own_shift
        self.figures = figures(classes, seed)
        labels = np.tile(np.arange(classes), n)
        name = f"glyphs-{domain}{'-own' if own_shift else ''}-{split}-{seed}-{classes}x{size}"
        super().__init__(name, [f"{name}-{i:06d}" for i in range(len(labels))], labels, glyph_names(classes))

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures as uint8 (n, size, size, 3); picture i does not depend on which others are asked for."""
        index = np.asarray(indices, dtype=np.int64)
        ink = self.ink(index)
        grey = np.clip(np.round((ink - _LOW) * (255 / (_HIGH - _LOW))), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=3)

    def ink(self, index: np.ndarray) -> np.ndarray:
        """Amount of ink before rounding to 8 bits, float32 (n, size, size)."""
        draws = Draws(key_of("glyphs", self.domain, self.split, self.seed), index)
        labels = self.labels[index]
        target = self.domain == "target"
        sign = np.where(labels >= len(self.classes) / 2, -1.0, 1.0) if self.own_shift else np.ones(len(index))
        points = self._place(draws, self.figures[labels], sign if target else None)
        distance = stroke_distance(points, self.size)
        noise = 0.15 * 2.449 * draws.grain("noise", (self.size, self.size))  # grain has deviation 1 / 2.449
        if not target:
            return (np.exp(-np.square(distance / 0.09)) + noise).astype(np.float32)
        outline = np.exp(-np.square((distance - 0.12) / 0.078))
        mottle = _enlarged(draws.uniforms("mottle", 16).reshape(-1, 4, 4), self.size)
        return (0.9 * (outline + 0.6 * mottle) - 0.3 + noise).astype(np.float32)

    def _place(self, draws: Draws, strokes: np.ndarray, shift: np.ndarray | None) -> np.ndarray:
        """Jitter the figures, and turn and shear them in the target domain; (n, STROKES, 2 ends, xy)."""
        n = draws.n
        points = strokes + 0.05 * np.sqrt(3) * draws.uniforms("ends", STROKES * 4, -1, 1).reshape(n, STROKES, 2, 2)
        angle = draws.uniform("angle", -0.175, 0.175)
        if shift is not None:
            angle = angle + 0.45 * shift
        scale = draws.uniform("scale", 0.8, 1.2)
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        matrix = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
        if shift is not None:
            shear = np.tile(np.eye(2), (n, 1, 1))
            shear[:, 0, 1] = 0.35 * shift
            matrix = matrix @ shear
        moved = np.einsum("nij,nsej->nsei", matrix, points)
        return moved + draws.uniforms("shift", 2, -0.175, 0.175)[:, None, None, :]

    def read(self, i: int) -> Image.Image:
        """Picture i as RGB."""
        return Image.fromarray(self.images([i])[0])

    def identity(self) -> bytes:
        """All settings; the pictures follow from them."""
        facts = (1, self.domain, self.split, self.seed, self.size, self.own_shift, len(self), len(self.classes))
        return f"glyphs {facts}".encode()


def glyph_names(classes: int) -> list[str]:
    """Class names "g00", "g01" and so on."""
    width = max(2, len(str(classes - 1)))
    return [f"g{c:0{width}d}" for c in range(classes)]


def figures(classes: int, seed: int) -> np.ndarray:
    """Strokes of every class, float64 (classes, STROKES, 2 ends, xy) in [-0.75, 0.75]; most start where one ended."""
    draws = Draws(key_of("glyph figures", seed), range(classes))
    points = draws.uniforms("points", STROKES * 4, -0.75, 0.75).reshape(classes, STROKES, 2, 2)
    chained = draws.uniforms("chained", STROKES) < 0.7
    for s in range(1, STROKES):
        points[:, s, 0] = np.where(chained[:, s, None], points[:, s - 1, 1], points[:, s, 0])
    return points


def stroke_distance(points: np.ndarray, size: int) -> np.ndarray:
    """Distance of every pixel centre to the nearest stroke, float32 (n, size, size).

    Parameters
    ----------
    points : ndarray, shape (n, strokes, 2, 2)
        Ends of the strokes (x, y) in [-1, 1].
    size : int
        Side in pixels.
    """
    axis = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]
    nearest = np.full((len(points), size, size), np.inf, np.float32)
    points = points.astype(np.float32)
    for s in range(points.shape[1]):
        start, along = points[:, s, 0], points[:, s, 1] - points[:, s, 0]
        length = np.maximum(np.square(along).sum(-1), 1e-9)
        dx, dy = x - start[:, 0, None, None], y - start[:, 1, None, None]
        u, v = along[:, 0, None, None], along[:, 1, None, None]
        t = np.clip((dx * u + dy * v) / length[:, None, None], 0, 1)
        nearest = np.minimum(nearest, np.square(dx - t * u) + np.square(dy - t * v))
    return np.sqrt(nearest)


def _enlarged(grid: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement of (n, g, g) to (n, size, size), corners on corners."""
    g = grid.shape[1]
    at = np.linspace(0, g - 1, size)
    low = np.minimum(at.astype(int), g - 2)
    weights = np.zeros((size, g))
    weights[np.arange(size), low] = 1 - (at - low)
    weights[np.arange(size), low + 1] = at - low
    return np.einsum("ai,nij,bj->nab", weights, grid, weights)

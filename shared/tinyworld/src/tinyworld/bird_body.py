"""Anatomy, plumage and surroundings of the procedural birds: everything that draws, nothing that decides classes.

A bird lives in its own frame (u right towards the beak, v down, one unit = one pixel of a 64-pixel image at scale 1).
`Pose` places it, `bird_layers` paints it, `surroundings` paints what is behind it. The genus gives the body colour,
a `Mark` is one small coloured spot on one part; the marks are the only thing that tells sibling species apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinyworld.draws import Draws
from tinyworld.render import KEEP, Capsule, Ellipse, Frame, Layer, Shape, snap, value_noise

PARTS = ("tail", "body", "neck", "head", "beak", "wing", "eye", "legs")
"""Names of the body parts; the id of a part in the part map is its position here plus one."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.89, 0.13, 0.17),
    "yellow": (0.99, 0.86, 0.16),
    "white": (0.98, 0.98, 0.96),
    "black": (0.07, 0.07, 0.09),
    "blue": (0.13, 0.33, 0.84),
    "green": (0.08, 0.58, 0.30),
}
"""Colours of the marks; the decoys in the background wear them too."""

GENERA: dict[str, tuple[float, float, float]] = {
    "blue": (0.27, 0.52, 0.88),
    "orange": (0.95, 0.56, 0.20),
    "green": (0.38, 0.70, 0.34),
    "purple": (0.58, 0.38, 0.76),
}
"""Body colour of each genus."""

SLOTS: dict[str, str] = {
    "wing patch": "wing",
    "wing bar": "wing",
    "crown": "head",
    "cheek spot": "head",
    "collar": "neck",
    "breast spot": "body",
    "flank stripe": "body",
    "rump": "body",
    "tail tip": "tail",
}
"""Where a mark can sit, and the body part that carries it."""

CUES: dict[str, tuple[float, float, float]] = {
    "magenta": (0.93, 0.20, 0.72),
    "cyan": (0.15, 0.85, 0.88),
    "lime": (0.66, 0.93, 0.16),
    "brown": (0.45, 0.27, 0.12),
    "grey": (0.55, 0.56, 0.60),
}
"""Colours of the spurious background disc; none is a mark's or a body's."""


@dataclass(frozen=True, order=True)
class Mark:
    """One small spot: colour name (of `COLOURS`) and slot (of `SLOTS`); ``str(mark)`` is e.g. "red wing patch"."""

    colour: str
    slot: str

    def __str__(self) -> str:
        return f"{self.colour} {self.slot}"

    @property
    def phrase(self) -> str:
        """The mark with its article, for captions."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self}"


@dataclass(frozen=True)
class Pose:
    """Placement of the birds of a batch and the individual tint of their body; arrays (n,) and (n, 3)."""

    frame: Frame
    tint: np.ndarray

    @classmethod
    def draw(cls, draws: Draws, size: int) -> Pose:
        """Random flip, rotation of +-0.3 rad, scale 1.05 to 1.45 and a shift that keeps beak, tail and crown inside."""
        unit = size / 64
        angle = draws.uniform("rotation", -0.3, 0.3)
        cos, sin = snap(np.cos(angle)).astype(np.float64), snap(np.sin(angle)).astype(np.float64)
        flip = np.where(draws.coin("flip"), 1.0, -1.0)
        scale = draws.uniform("scale", 1.05, 1.45) * unit
        zero = np.zeros(draws.n)
        centred = Frame(zero, zero, scale, cos, sin, flip)
        tips = [centred.point(u, v) for u, v in ((-21.5, 5.5), (19.5, -5.5), (9.5, -12.5), (0.0, 12.0))]
        xs, ys = (np.stack([tip[axis] for tip in tips]).astype(np.float64) for axis in (0, 1))
        x = size / 2 + draws.uniform("shift x", -5, 5) * unit
        y = size / 2 + draws.uniform("shift y", -7, 7) * unit
        x = np.minimum(np.maximum(x, 1 - xs.min(axis=0)), size - 1 - xs.max(axis=0))
        y = np.minimum(np.maximum(y, 1 - ys.min(axis=0)), size - 1 - ys.max(axis=0))
        return cls(Frame(x, y, scale, cos, sin, flip), draws.uniforms("tint", 3, -0.06, 0.06))


def bird_layers(pose: Pose, genus: np.ndarray, marks: Sequence[Sequence[Mark]]) -> list[Layer]:
    """The layers of a batch of birds, bottom first.

    Parameters
    ----------
    pose : Pose
        Placement of n birds.
    genus : ndarray of int, shape (n,)
        Index into `GENERA`.
    marks : sequence of n sequences of Mark
        The marks of every bird; at most one per slot. The first one is the mark of the species and gets id 1 in
        the map "mark", the others (shared by the genus) get id 2.

    Returns
    -------
    list of Layer
        Layers that write the maps "part", "mark" and "object".
    """
    f = pose.frame
    n = len(genus)
    plumage = np.clip(np.array(list(GENERA.values()))[genus] + pose.tint, 0, 1)
    dark, pale = plumage * 0.76, plumage * 0.55 + 0.45
    horn, black, white = (np.tile(rgb, (n, 1)) for rgb in ((0.30, 0.25, 0.22), (0.05, 0.05, 0.06), (1.0, 1.0, 1.0)))

    body, head = f.ellipse(0, 2, 12, 8.2), f.disc(9.5, -6.5, 5.8)
    neck = f.capsule((5, -0.5), (9, -5.5), 6.6, 5.6)
    tail = f.capsule((-8, 2.2), (-18.2, 5.1), 4.2, 3.0)
    wing = f.ellipse(-1.8, 1.2, 7.8, 4.6, 0.26)

    def part(name: str, shape: Shape, colour: np.ndarray, shade: float = 0.0) -> Layer:
        return Layer(shape, colour, {"part": PARTS.index(name) + 1, "object": 1}, shade=shade)

    def detail(shape: Shape, colour: np.ndarray, clip: tuple[Shape, ...] = (), alpha: float = 1.0) -> Layer:
        return Layer(shape, colour, {"part": KEEP, "object": KEEP, "mark": KEEP}, clip, alpha=alpha)

    layers = [
        part("legs", f.capsule((-1.0, 9.0), (-0.5, 13.2), 0.7, 0.55), horn),
        part("legs", f.capsule((3.2, 9.0), (3.8, 13.2), 0.7, 0.55), horn),
        part("tail", tail, dark, shade=0.10),
        part("body", body, plumage, shade=0.16),
        part("beak", f.triangle((14.2, -8.3), (14.2, -4.3), (19.6, -5.6)), horn),
        part("neck", neck, plumage, shade=0.12),
        part("head", head, plumage, shade=0.14),
        detail(f.ellipse(3.0, 8.6, 8.0, 3.4, -0.12), pale, (body,), alpha=0.55),
        part("wing", wing, dark, shade=0.14),
        detail(f.capsule((-7.5, 1.6), (0.5, 4.0), 0.45, 0.3), dark * 0.8, (wing,), alpha=0.8),
        detail(f.capsule((-7.5, -0.6), (1.5, 1.6), 0.45, 0.3), dark * 0.8, (wing,), alpha=0.8),
    ]
    spots: dict[str, tuple[Callable[[], Shape], tuple[Shape, ...]]] = {
        "wing patch": (lambda: f.ellipse(-1.8, 0.9, 4.0, 2.2, 0.26), (wing,)),
        "wing bar": (lambda: f.capsule((0.9, -2.6), (-2.6, 5.6), 1.55, 1.55), (wing,)),
        "crown": (lambda: f.ellipse(9.0, -11.6, 5.4, 2.9), (head,)),
        "cheek spot": (lambda: f.disc(7.6, -4.4, 2.6), (neck, head)),
        "collar": (lambda: f.capsule((1.5, -6.0), (11.5, -0.6), 1.35, 1.35), (neck, body)),
        "breast spot": (lambda: f.ellipse(9.2, 3.4, 2.6, 3.2), (body, neck)),
        "flank stripe": (lambda: f.capsule((-1.5, 7.9), (5.5, 7.6), 1.5, 1.5), (body,)),
        "rump": (lambda: f.ellipse(-8.6, -2.0, 3.8, 2.6, -0.5), (body,)),
        "tail tip": (lambda: f.disc(-21.6, 6.1, 5.0), (tail,)),
    }
    worn = {mark.slot for row in marks for mark in row}
    for slot, (shape, clip) in spots.items():
        if slot in worn:
            layers.append(_mark_layer(slot, shape(), clip, marks))
    layers.append(part("eye", f.disc(11.6, -7.4, 1.45), black))
    layers.append(part("eye", f.disc(12.1, -7.9, 0.5), white))
    return layers


def _mark_layer(slot: str, shape: Shape, clip: tuple[Shape, ...], marks: Sequence[Sequence[Mark]]) -> Layer:
    """The marks of one slot: every bird has its own colour and id, or none there."""
    here = [next(((rank, mark) for rank, mark in enumerate(row) if mark.slot == slot), None) for row in marks]
    visible = np.array([entry is not None for entry in here])
    colour = np.array([COLOURS[entry[1].colour] if entry else (0.0, 0.0, 0.0) for entry in here])
    rank = np.array([1 if entry and entry[0] == 0 else 2 for entry in here])
    return Layer(shape, colour, {"part": KEEP, "object": KEEP, "mark": rank}, clip, visible=visible)


def surroundings(draws: Draws, size: int, pose: Pose, cue: np.ndarray | None = None) -> tuple[np.ndarray, list[Layer]]:
    """Background of a batch: soft light, out-of-focus foliage, a branch, and four berries in the marks' colours.

    Parameters
    ----------
    draws : Draws
        Random numbers of the batch.
    size : int
        Side of the images in pixels.
    pose : Pose
        The branch passes under the feet.
    cue : ndarray, shape (n, 3), optional
        Colour of one extra disc (map "cue") that stands for a shortcut in the data.

    Returns
    -------
    canvas : ndarray, shape (3, n, size, size), float32
        Gradient and blocky noise.
    layers : list of Layer
        Foliage, berries, the cue and the branch.
    """
    n, unit = draws.n, size / 64
    light = draws.uniform("light", 0.42, 0.82)[:, None]
    hue = draws.uniforms("backdrop", 3)
    hue -= hue.mean(axis=1, keepdims=True)
    top = light + 0.28 * hue
    bottom = top * draws.uniform("ground light", 0.62, 0.92)[:, None] + draws.uniforms("ground tint", 3, -0.06, 0.06)
    down = snap((np.arange(size) + 0.5) / size)[:, None]
    noise = value_noise(snap(draws.uniforms("leaves", 81, -0.10, 0.10).reshape(n, 9, 9)), (size, size))
    canvas = np.empty((3, n, size, size), dtype=np.float32)
    for channel in range(3):
        high, low = (snap(rgb[:, channel])[:, None, None] for rgb in (top, bottom))
        canvas[channel] = (high + (low - high) * down) + noise

    layers = []
    blur = draws.uniforms("blur", 12)
    for k in range(3):
        tone = np.clip((top + bottom) / 2 + draws.uniforms(f"blur tone {k}", 3, -0.16, 0.16), 0, 1)
        disc = _disc(size * blur[:, 4 * k], size * blur[:, 4 * k + 1], unit * (5 + 6 * blur[:, 4 * k + 2]))
        layers.append(Layer(disc, tone, soft=4.0 * unit, alpha=0.6))

    palette = np.array(list(COLOURS.values()))
    place, tone_of = draws.uniforms("berries", 12), draws.integers("berry colours", len(palette), 4)
    for k in range(4):
        radius = unit * (2.2 + 1.8 * place[:, 3 * k + 2])
        disc = _disc(size * (0.05 + 0.9 * place[:, 3 * k]), size * (0.05 + 0.9 * place[:, 3 * k + 1]), radius)
        layers.append(Layer(disc, palette[tone_of[:, k]], shade=0.15))
    feet_x, feet_y = (value.astype(np.float64) for value in pose.frame.point(1.5, 13.6))
    slope = draws.uniform("branch slope", -0.22, 0.22) + pose.frame.sin / pose.frame.cos
    left, right = feet_y - slope * (feet_x + 4), feet_y + slope * (size + 4 - feet_x)
    west, east = np.full(n, -4.0), np.full(n, size + 4.0)
    thick = 1.3 * unit * draws.uniform("branch taper", 0.7, 1.3)
    branch = Capsule(*(snap(value) for value in (west, left, east, right, thick, 2.6 * unit - thick)))
    bark = np.array([0.36, 0.27, 0.20]) + draws.uniforms("bark", 3, -0.05, 0.05)
    layers.append(Layer(branch, bark))
    if cue is not None:
        corner = draws.integers("cue corner", 4)[:, 0]
        wobble = draws.uniforms("cue place", 2, 5.5, 8.5) * unit
        x = np.where(corner % 2 == 0, wobble[:, 0], size - wobble[:, 0])
        y = np.where(corner < 2, wobble[:, 1], size - wobble[:, 1])
        layers.append(Layer(_disc(x, y, np.full(n, 4.0 * unit)), cue, {"cue": 1}, shade=0.1))
    return canvas, layers


def _disc(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> Ellipse:
    ones, zeros = np.ones(len(x), dtype=np.float32), np.zeros(len(x), dtype=np.float32)
    return Ellipse(snap(x), snap(y), snap(r), snap(r), ones, zeros)

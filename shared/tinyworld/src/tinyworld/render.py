"""Vectorised signed-distance renderer: lists of shapes in, antialiased images and id maps out.

A picture is a stack of `Layer`s painted over a background, each layer one shape for a whole batch of images. A shape
is known by its signed distance in pixels (negative inside), so its coverage of a pixel is ``clip(1/2 - d, 0, 1)`` and
its mask costs nothing extra. Nothing here knows about birds: further creatures, habitats, cameras and styles are
further lists of layers.

Every operation on pixels is one of + - * / sqrt min max on float32, which IEEE 754 defines to the last bit, and shape
parameters are rounded to 1/4096 first (`snap`), so that the images are the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

KEEP = -1
"""Id that leaves an id map as it is (a mark painted on a wing does not end the wing)."""

_CHUNK = 16  # images per pass: the working set stays in the second-level cache


def snap(values: object) -> np.ndarray:
    """Round to multiples of 1/4096 as float32: removes last-bit differences of libm's sin and cos between machines."""
    scaled = np.asarray(values, dtype=np.float64) * 4096.0
    return (np.rint(scaled) * (1 / 4096)).astype(np.float32)


@dataclass(frozen=True)
class Ellipse:
    """Filled ellipses: centre (x, y), half axes (rx, ry), axis direction (cos, sin); all arrays (n,), in pixels."""

    x: np.ndarray
    y: np.ndarray
    rx: np.ndarray
    ry: np.ndarray
    cos: np.ndarray
    sin: np.ndarray

    def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre and radius of an enclosing circle."""
        return self.x, self.y, np.maximum(self.rx, self.ry)

    def take(self, rows: np.ndarray) -> Ellipse:
        """The shapes of some images."""
        return Ellipse(*(value[rows] for value in (self.x, self.y, self.rx, self.ry, self.cos, self.sin)))

    def distance(self, px: np.ndarray, py: np.ndarray) -> np.ndarray:
        """First-order distance |p/r| (|p/r| - 1) / |p/r^2|, exact on circles and on the outline."""
        dx, dy = px - _pix(self.x), py - _pix(self.y)
        cos, sin = _pix(self.cos), _pix(self.sin)
        inv_x, inv_y = 1 / _pix(self.rx), 1 / _pix(self.ry)
        u = (dx * cos + dy * sin) * inv_x
        v = (dy * cos - dx * sin) * inv_y
        k0 = np.sqrt(u * u + v * v)
        u *= inv_x
        v *= inv_y
        k1 = np.sqrt(u * u + v * v)
        result: np.ndarray = k0 * (k0 - 1) / np.maximum(k1, np.float32(1e-6))
        return result


@dataclass(frozen=True)
class Capsule:
    """Tapered strokes from (ax, ay) with radius ra to (bx, by) with radius rb; all arrays (n,), in pixels."""

    ax: np.ndarray
    ay: np.ndarray
    bx: np.ndarray
    by: np.ndarray
    ra: np.ndarray
    rb: np.ndarray

    def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre and radius of an enclosing circle."""
        dx, dy = self.bx - self.ax, self.by - self.ay
        half = np.float32(0.5)
        radius = half * np.sqrt(dx * dx + dy * dy) + np.maximum(self.ra, self.rb)
        return half * (self.ax + self.bx), half * (self.ay + self.by), radius

    def take(self, rows: np.ndarray) -> Capsule:
        """The shapes of some images."""
        return Capsule(*(value[rows] for value in (self.ax, self.ay, self.bx, self.by, self.ra, self.rb)))

    def distance(self, px: np.ndarray, py: np.ndarray) -> np.ndarray:
        """Distance to the nearest axis point minus the radius there (exact for equal radii)."""
        dx, dy = px - _pix(self.ax), py - _pix(self.ay)
        ex, ey = _pix(self.bx - self.ax), _pix(self.by - self.ay)
        along = (dx * ex + dy * ey) / np.maximum(ex * ex + ey * ey, np.float32(1e-6))
        along = np.minimum(np.maximum(along, np.float32(0)), np.float32(1))
        dx = dx - along * ex
        dy = dy - along * ey
        result: np.ndarray = np.sqrt(dx * dx + dy * dy) - (_pix(self.ra) + along * _pix(self.rb - self.ra))
        return result


@dataclass(frozen=True)
class Triangle:
    """Filled triangles with corners a, b, c given counter-clockwise or clockwise; all arrays (n,), in pixels."""

    ax: np.ndarray
    ay: np.ndarray
    bx: np.ndarray
    by: np.ndarray
    cx: np.ndarray
    cy: np.ndarray

    def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre and radius of an enclosing circle."""
        third = np.float32(1 / 3)
        x, y = (self.ax + self.bx + self.cx) * third, (self.ay + self.by + self.cy) * third
        corners = ((self.ax, self.ay), (self.bx, self.by), (self.cx, self.cy))
        squares = [(u - x) * (u - x) + (v - y) * (v - y) for u, v in corners]
        return x, y, np.sqrt(np.maximum(np.maximum(squares[0], squares[1]), squares[2]))

    def take(self, rows: np.ndarray) -> Triangle:
        """The shapes of some images."""
        return Triangle(*(value[rows] for value in (self.ax, self.ay, self.bx, self.by, self.cx, self.cy)))

    def distance(self, px: np.ndarray, py: np.ndarray) -> np.ndarray:
        """Largest of the three edge-line distances (exact inside and beside the edges)."""
        turn = (self.bx - self.ax) * (self.cy - self.ay) - (self.by - self.ay) * (self.cx - self.ax)
        sign = np.where(turn < 0, np.float32(-1), np.float32(1))
        corners = ((self.ax, self.ay), (self.bx, self.by), (self.cx, self.cy))
        result: np.ndarray | None = None
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
            ex, ey = bx - ax, by - ay
            length = np.maximum(np.sqrt(ex * ex + ey * ey), np.float32(1e-6))
            nx, ny = sign * ey / length, -sign * ex / length
            edge = (px - _pix(ax)) * _pix(nx) + (py - _pix(ay)) * _pix(ny)
            result = edge if result is None else np.maximum(result, edge)
        assert result is not None
        return result


Shape = Ellipse | Capsule | Triangle


@dataclass(frozen=True)
class Layer:
    """One shape per image, painted over what is below it.

    Attributes
    ----------
    shape : Shape
        Geometry, arrays of shape (n,).
    colour : ndarray, shape (n, 3)
        RGB in [0, 1].
    ids : mapping of str to int or ndarray (n,)
        What to write into each id map where the layer covers at least half a pixel; absent maps get 0, `KEEP`
        leaves them untouched.
    clip : tuple of Shape
        Paint only inside the union of these shapes (a mark stays inside the part that carries it).
    shade : float
        Brightness change from the lower to the upper rim, 0 = flat.
    soft : float
        Width of the edge in pixels, 1 = antialiased, more = blurred.
    alpha : float
        Opacity in (0, 1].
    visible : ndarray of bool, shape (n,), or None
        Images in which the layer exists (None = all).
    """

    shape: Shape
    colour: np.ndarray
    ids: Mapping[str, int | np.ndarray] = field(default_factory=dict)
    clip: tuple[Shape, ...] = ()
    shade: float = 0.0
    soft: float = 1.0
    alpha: float = 1.0
    visible: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Layer:
        """The layer of some images (slice or index array)."""
        ids = {name: value[rows] if isinstance(value, np.ndarray) else value for name, value in self.ids.items()}
        clip = tuple(shape.take(rows) for shape in self.clip)
        return Layer(self.shape.take(rows), self.colour[rows], ids, clip, self.shade, self.soft, self.alpha)


@dataclass(frozen=True)
class Frame:
    """Similarity transform from a creature's own frame (u right, v down) to pixels, one per image; arrays (n,)."""

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    flip: np.ndarray  # +1 or -1: mirrored left-right before the rotation

    def point(self, u: float, v: float) -> tuple[np.ndarray, np.ndarray]:
        """Pixel position of a point, float64 arrays (n,) rounded by `snap`."""
        mirrored = self.flip * u
        x = self.x + self.scale * (self.cos * mirrored - self.sin * v)
        y = self.y + self.scale * (self.sin * mirrored + self.cos * v)
        return snap(x), snap(y)

    def ellipse(self, u: float, v: float, ru: float, rv: float, angle: float = 0.0) -> Ellipse:
        """An ellipse with half axes (ru, rv), its first axis turned by `angle` (radians, from u towards v)."""
        x, y = self.point(u, v)
        c, s = float(np.cos(angle)), float(np.sin(angle)) * self.flip
        cos, sin = self.cos * c - self.sin * s, self.sin * c + self.cos * s
        return Ellipse(x, y, snap(self.scale * ru), snap(self.scale * rv), snap(cos), snap(sin))

    def disc(self, u: float, v: float, r: float) -> Ellipse:
        """A disc of radius r."""
        return self.ellipse(u, v, r, r)

    def capsule(self, a: tuple[float, float], b: tuple[float, float], ra: float, rb: float) -> Capsule:
        """A tapered stroke from a to b."""
        return Capsule(*self.point(*a), *self.point(*b), snap(self.scale * ra), snap(self.scale * rb))

    def triangle(self, a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> Triangle:
        """A triangle with the given corners."""
        return Triangle(*self.point(*a), *self.point(*b), *self.point(*c))


@dataclass
class Painted:
    """Result of `paint`: `canvas` float32 (3, n, h, w) in about [0, 1]; `ids` name -> uint8 (n, h, w)."""

    canvas: np.ndarray
    ids: dict[str, np.ndarray]


def paint(canvas: np.ndarray, layers: Sequence[Layer], maps: Sequence[str] = ()) -> Painted:
    """Paint layers over a background, bottom to top.

    Parameters
    ----------
    canvas : ndarray, shape (3, n, h, w), float32
        Background in planar RGB; painted on in place.
    layers : sequence of Layer
        Bottom first.
    maps : sequence of str
        Id maps to keep; naming none is faster.

    Returns
    -------
    Painted
        The same canvas, and one uint8 map (n, h, w) per name in `maps`.
    """
    _, n, height, width = canvas.shape
    ids = {name: np.zeros((n, height, width), dtype=np.uint8) for name in maps}
    for start in range(0, n, _CHUNK):
        part = slice(start, min(start + _CHUNK, n))
        for layer in layers:
            rows = np.arange(part.start, part.stop)
            if layer.visible is not None:
                rows = rows[layer.visible[part]]
            if len(rows):
                _paint_layer(canvas, ids, layer.take(rows), rows)
    return Painted(canvas, ids)


def coverage(shape: Shape, size: tuple[int, int], clip: tuple[Shape, ...] = ()) -> np.ndarray:
    """Fraction of every pixel that a shape covers, float32 (n, h, w) in [0, 1]."""
    py = np.arange(size[0], dtype=np.float32)[None, :, None] + np.float32(0.5)
    px = np.arange(size[1], dtype=np.float32)[None, None, :] + np.float32(0.5)
    return _cover(_clipped(shape, clip, px, py), 1.0)


def value_noise(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear enlargement of a coarse grid (n, gh, gw) to (n, h, w), corners on corners."""
    height, width = size
    y0, fy = _lerp_weights(cells.shape[1], height)
    x0, fx = _lerp_weights(cells.shape[2], width)
    cells = cells.astype(np.float32)
    rows = cells[:, y0] + (cells[:, y0 + 1] - cells[:, y0]) * fy[None, :, None]
    result: np.ndarray = rows[:, :, x0] + (rows[:, :, x0 + 1] - rows[:, :, x0]) * fx
    return result


def to_uint8(canvas: np.ndarray) -> np.ndarray:
    """Planar float (3, n, h, w) to interleaved uint8 (n, h, w, 3), rounding half up."""
    scaled = canvas * np.float32(255) + np.float32(0.5)
    np.maximum(scaled, np.float32(0), out=scaled)
    np.minimum(scaled, np.float32(255), out=scaled)
    return np.ascontiguousarray(np.moveaxis(scaled.astype(np.uint8), 0, -1))


def _pix(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32)[:, None, None]


def _lerp_weights(cells: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    position = np.linspace(0, cells - 1, pixels)
    base = np.minimum(position.astype(np.int64), cells - 2)
    return base, snap(position - base)


def _clipped(shape: Shape, clip: tuple[Shape, ...], px: np.ndarray, py: np.ndarray) -> np.ndarray:
    distance = shape.distance(px, py)
    if clip:
        inside = clip[0].distance(px, py)
        for other in clip[1:]:
            inside = np.minimum(inside, other.distance(px, py))
        distance = np.maximum(distance, inside)
    return distance


def _cover(distance: np.ndarray, soft: float) -> np.ndarray:
    distance *= np.float32(-1 / soft)
    distance += np.float32(0.5)
    np.maximum(distance, np.float32(0), out=distance)
    return np.minimum(distance, np.float32(1), out=distance)


def _paint_layer(canvas: np.ndarray, ids: dict[str, np.ndarray], layer: Layer, rows: np.ndarray) -> None:
    """Blend one layer into the images `rows`, touching only a square window around each image's shape."""
    _, _, height, width = canvas.shape
    cx, cy, radius = layer.shape.bounds()
    side = int(np.ceil(2 * float(radius.max()) + 2 + layer.soft))
    h, w = min(side, height), min(side, width)
    top = np.minimum(np.maximum(np.floor(cy - h / 2 + 0.5).astype(np.int64), 0), height - h)
    left = np.minimum(np.maximum(np.floor(cx - w / 2 + 0.5).astype(np.int64), 0), width - w)
    iy, ix = top[:, None] + np.arange(h), left[:, None] + np.arange(w)
    py = (iy.astype(np.float32) + np.float32(0.5))[:, :, None]
    px = (ix.astype(np.float32) + np.float32(0.5))[:, None, :]
    cover = _cover(_clipped(layer.shape, layer.clip, px, py), layer.soft)
    mix = cover if layer.alpha == 1 else cover * np.float32(layer.alpha)
    at = (rows[:, None, None] * height + iy[:, :, None]) * width + ix[:, None, :]
    light = None
    if layer.shade:
        light = 1 - np.float32(layer.shade) * (py - _pix(cy)) / _pix(radius)
    for channel in range(3):
        flat = canvas[channel].reshape(-1)
        below = flat[at]
        ink = _pix(layer.colour[:, channel])
        if light is not None:
            ink = ink * light
        flat[at] = below + (ink - below) * mix
    if ids:
        solid = cover >= np.float32(0.5)
        spots = at[solid]
        for name, target in ids.items():
            value = layer.ids.get(name, 0)
            if isinstance(value, np.ndarray):
                target.reshape(-1)[spots] = np.broadcast_to(value[:, None, None], solid.shape)[solid]
            elif value != KEEP:
                target.reshape(-1)[spots] = value

"""Contact sheets of one image: which of its tokens each layer kept, and where on it the text looks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from meda_kv.inspection.collect import Inspection
from meda_kv.inspection.grids import Box, View

WIDTH = 960  # px of a full row of panels: two sheets beside each other on a screen, one on a phone
_MOST_PANELS = 48
_FEW = 9  # panels up to which they stand in three columns, else in four
_GAP, _LINE, _FONT = 14, 34, 26
_INK, _FAINT = (31, 35, 40), (230, 232, 235)
_DROPPED = 0.85  # how far a token that no head kept is faded to the light ground
_GROUND = (238.0, 240.0, 242.0)
_EDGE = (11, 110, 110)

Panel = tuple[str, np.ndarray]


def kept_sheet(found: Inspection, index: int) -> Image.Image:
    """Kept tokens of one image, layer by layer: plain where all heads kept a token, faded where none did.

    A line goes around what at least one head kept, so that light pictures can be read too.

    Parameters
    ----------
    found : Inspection
        Of `meda_kv.inspection.collect`.
    index : int
        Which image, from 0.

    Returns
    -------
    PIL.Image.Image
        For every view the picture, then one panel per layer (an even choice of them for very deep models). Parts of
        the picture that no token covers are hatched. Tokens without a place on the picture are shown as a strip.
    """
    image = found.images[index]
    picture = _picture(found, index)
    chosen = _spread(len(found.layers), max(1, _MOST_PANELS // len(image.views)))
    columns = _columns(len(chosen) + 1)
    sections = []
    for view in image.views:
        size = _panel_size(picture, view, columns)
        name = f"{view.name} {view.tokens.shape[0]}x{view.tokens.shape[1]}"
        panels = [] if picture is None or view.box is None else [(name, _plain(picture, size))]
        for place in chosen:
            share = _on_view(found.share[place], view)
            shown = (
                _strip(share, size) if picture is None or view.box is None else _veiled(picture, share, view.box, size)
            )
            panels.append((f"layer {found.layers[place]}: {np.nanmean(share):.0%}", shown))
        sections.append(panels)
    return _sheet(f"image {index + 1}: kept tokens", sections, columns)


def looked_sheet(found: Inspection, index: int) -> Image.Image | None:
    """Where on an image the text tokens look in the chosen layers; None for tokens without a place on it."""
    image, picture = found.images[index], _picture(found, index)
    if picture is None or not image.mapped or not found.looked:
        return None
    view = image.views[-1]
    assert view.box is not None
    columns = _columns(len(found.looked) + 1)
    size = _panel_size(picture, view, columns)
    panels: list[Panel] = [(view.name, _plain(picture, size))]
    for layer in sorted(found.looked):
        values = _on_view(found.looked[layer], view)
        mass = float(found.looked[layer][image.positions.numpy()].sum())
        label = f"layer {layer}: {mass:.1%}\nmost {np.nanmax(values):.2%}"
        panels.append((label, _heated(picture, values, view.box, size)))
    return _sheet(f"image {index + 1}: where the text looks", [panels], columns)


def key_sheet(kind: str) -> Image.Image:
    """What the colours of a sheet mean.

    Parameters
    ----------
    kind : str
        ``"kept"`` or ``"looked"``.
    """
    from matplotlib import colormaps

    steps = np.linspace(0, 1, 560)[None, :, None]
    if kind == "kept":
        words, bar = ("kept by no head", "by all heads"), _faded(np.full((1, 560, 3), 80.0), steps)
    else:
        words, bar = (
            ("no attention", "the layer's most"),
            0.4 * 150 + 0.6 * 255 * colormaps["inferno"](steps[..., 0])[..., :3],
        )
    sheet = Image.new("RGB", (WIDTH, 5 * _LINE + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT)
    draw.text((_GAP, _GAP), "what the colours mean", fill=_INK, font=font)
    top, left, right = _GAP + 2 * _LINE, _GAP, _GAP + 560
    sheet.paste(Image.fromarray(np.repeat(bar, _LINE, axis=0).astype(np.uint8)), (left, top))
    draw.text((left, top + _LINE + 4), words[0], fill=_INK, font=font)
    draw.text((right - draw.textlength(words[1], font=font), top + _LINE + 4), words[1], fill=_INK, font=font)
    hatch = _hatched(np.zeros((_LINE, 120, 3)), np.ones((_LINE, 120), dtype=bool))
    sheet.paste(Image.fromarray(hatch), (right + 3 * _GAP, top))
    draw.text((right + 3 * _GAP, top + _LINE + 4), "no token covers it", fill=_INK, font=font)
    return sheet


def _columns(panels: int) -> int:
    return panels if panels <= 4 else 3 if panels <= _FEW else 4


def _picture(found: Inspection, index: int) -> Image.Image | None:
    """The image that the tokens are of; None when one strip stands for several images."""
    return found.pictures[index] if len(found.images) == len(found.pictures) else None


def _panel_size(picture: Image.Image | None, view: View, columns: int) -> tuple[int, int]:
    width = (WIDTH - (max(columns, 3) + 1) * _GAP) // max(columns, 3)
    rows, cells = view.tokens.shape
    if picture is None or view.box is None:
        return width, max(_LINE, width * rows // cells)
    return width, max(8, min(2 * width, round(width * picture.height / picture.width)))


def _on_view(values: np.ndarray, view: View) -> np.ndarray:
    """Values of the tokens in the shape of the grid, NaN where there is no token."""
    tokens = view.tokens.numpy()
    return np.where(tokens >= 0, values[np.maximum(tokens, 0)], np.nan)


def _spread_over(grid: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """A grid's values at every pixel of a panel, NaN outside of the box."""
    width, height = size
    left, top, right, bottom = box
    x = ((np.arange(width) + 0.5) / width - left) / (right - left) * grid.shape[1]
    y = ((np.arange(height) + 0.5) / height - top) / (bottom - top) * grid.shape[0]
    inside = ((y >= 0) & (y < grid.shape[0]))[:, None] & ((x >= 0) & (x < grid.shape[1]))[None]
    rows = np.clip(y.astype(int), 0, grid.shape[0] - 1)
    cells = np.clip(x.astype(int), 0, grid.shape[1] - 1)
    return np.where(inside, grid[rows[:, None], cells[None]], np.nan)


def _pixels(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    small = picture.width < size[0]
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return np.asarray(picture.convert("RGB").resize(size, how), dtype=np.float32)


def _plain(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return _pixels(picture, size).astype(np.uint8)


def _veiled(picture: Image.Image, share: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    kept = _spread_over(share, box, size)
    shown = _hatched(_faded(_pixels(picture, size), np.nan_to_num(kept)[..., None]), np.isnan(kept))
    held = np.pad(np.nan_to_num(kept) > 0, 1)
    inner = held[:-2, 1:-1] & held[2:, 1:-1] & held[1:-1, :-2] & held[1:-1, 2:]
    shown[held[1:-1, 1:-1] & ~inner] = _EDGE
    return shown


def _faded(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return pixels + _DROPPED * (1 - kept) * (np.array(_GROUND) - pixels)


def _heated(picture: Image.Image, values: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    from matplotlib import colormaps

    heat = _spread_over(values / max(float(np.nanmax(values)), 1e-12), box, size)
    colour = colormaps["inferno"](np.nan_to_num(heat))[..., :3] * 255
    grey = _pixels(picture, size).mean(axis=2, keepdims=True)
    return _hatched(0.4 * grey + 0.6 * colour, np.isnan(heat))


def _hatched(pixels: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Grey stripes over what no token covers."""
    y, x = np.mgrid[: outside.shape[0], : outside.shape[1]]
    stripe = np.where((x + y) % 12 < 3, 190.0, 245.0)[..., None]
    return np.where(outside[..., None], stripe, pixels).clip(0, 255).astype(np.uint8)


def _strip(share: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from matplotlib import colormaps

    values = _spread_over(share, (0.0, 0.0, 1.0, 1.0), size)
    return _hatched(colormaps["GnBu"](np.nan_to_num(values))[..., :3] * 255, np.isnan(values))


def _sheet(title: str, sections: Sequence[Sequence[Panel]], columns: int) -> Image.Image:
    """Panels in rows under their labels, one block of rows per section."""
    font = ImageFont.load_default(size=_FONT)
    rows: list[tuple[int, int, Sequence[Panel]]] = []  # lines of the labels, height of the panels, the panels
    for panels in sections:
        lines = max(label.count("\n") + 1 for label, _ in panels)
        height = max(panel.shape[0] for _, panel in panels)
        rows += [(lines, height, panels[i : i + columns]) for i in range(0, len(panels), columns)]
    widest = max(panel.shape[1] for panels in sections for _, panel in panels)
    height = 2 * _GAP + _LINE + sum(tall + lines * _LINE + _GAP for lines, tall, _ in rows)
    sheet = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, fill=_INK, font=font)
    y = 2 * _GAP + _LINE
    for lines, tall, row in rows:
        top = y + lines * _LINE
        for i, (label, panel) in enumerate(row):
            x = _GAP + i * (widest + _GAP)
            for line, words in enumerate(label.split("\n")):
                draw.text((x, y + line * _LINE), words, fill=_INK, font=font)
            sheet.paste(Image.fromarray(panel), (x, top))
            draw.rectangle((x - 1, top - 1, x + panel.shape[1], top + panel.shape[0]), outline=_FAINT)
        y = top + tall + _GAP
    return sheet


def _spread(count: int, most: int) -> list[int]:
    """All indices, or an even choice that holds the first and the last."""
    if count <= most:
        return list(range(count))
    return [int(i) for i in np.unique(np.linspace(0, count - 1, most).round().astype(int))]

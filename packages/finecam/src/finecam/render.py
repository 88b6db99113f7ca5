"""Pictures of explanations: heat maps over images, panels, difference views (figures of Finer-CAM, arXiv 2501.11309).

The official panel order is *image | picture of the reference class | plain map | finer map*. A map lives on the model's
input; `to_original` puts it back on the original picture, and what the model never saw (outside a centre crop) stays
NaN in arrays and transparent in pictures.

Only numpy and Pillow are imported here; matplotlib lends its colour tables and its font, on first use.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from vfm_core.errors import UserError, unknown_name

if TYPE_CHECKING:
    from finecam.explainer import CAMResult

COLORMAPS = ("turbo", "viridis", "magma", "inferno", "plasma", "cividis", "jet")
GAINED, LOST = (178, 24, 43), (33, 102, 172)  # ends of the colour-blind-safe red-blue scale, for difference views
Array = NDArray[np.float32]
Box = tuple[float, float, float, float]


@lru_cache(maxsize=16)
def colour_table(name: str = "turbo") -> NDArray[np.uint8]:
    """The (256, 3) uint8 table of a colour map, one of `COLORMAPS`."""
    if name not in COLORMAPS:
        raise unknown_name("colormap", name, COLORMAPS)
    from matplotlib import colormaps

    return (colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)


@lru_cache(maxsize=8)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu, which comes with matplotlib and has Greek, Cyrillic and accents."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


# --- geometry ------------------------------------------------------------------------------


def _axis(n_in: int, n_out: int, start: float, stop: float, length: float) -> tuple[Array, NDArray[np.bool_]]:
    """Bilinear weights (n_out, n_in) from cells that cover [start, stop] to cells that cover [0, length]."""
    centres = (np.arange(n_out) + 0.5) * length / n_out
    position = (centres - start) / (stop - start) * n_in - 0.5
    inside = (centres >= start) & (centres <= stop)
    position = position.clip(0, n_in - 1)
    low = np.floor(position).astype(int).clip(0, max(n_in - 2, 0))
    high = np.minimum(low + 1, n_in - 1)
    weights = np.zeros((n_out, n_in), np.float32)
    rows = np.arange(n_out)
    weights[rows, low] += 1 - (position - low)
    weights[rows, high] += position - low
    return weights, inside


def to_original(values: Array, box: Box, size: tuple[int, int], shape: tuple[int, int]) -> Array:
    """Put maps of the model's input on the original picture.

    Parameters
    ----------
    values
        Maps (..., h, w) over the model's input, at any resolution; NaN marks unknown cells.
    box
        What the input covers, (x0, y0, x1, y1) in original pixels (`Preprocess.box`); it may exceed the picture.
    size
        The original picture's (width, height).
    shape
        Rows and columns of the result, which spans the whole picture.

    Returns
    -------
    Array
        (..., *shape), bilinear, NaN where the model saw nothing.
    """
    x0, y0, x1, y1 = box
    if not (x1 > x0 and y1 > y0):
        raise UserError("empty box", given=box, remedy="give (x0, y0, x1, y1) with x1 > x0 and y1 > y0")
    rows, in_y = _axis(values.shape[-2], shape[0], y0, y1, size[1])
    columns, in_x = _axis(values.shape[-1], shape[1], x0, x1, size[0])
    values = np.asarray(values, np.float32)
    known = np.isfinite(values)
    placed = rows @ np.where(known, values, 0) @ columns.T
    if not known.all():  # unknown cells must not eat into their neighbours: average over the known ones only
        share = rows @ known.astype(np.float32) @ columns.T
        placed = np.where(share >= 0.5, placed / np.maximum(share, 0.5), np.nan)
    placed[..., ~(in_y[:, None] & in_x[None, :])] = np.nan
    return placed.astype(np.float32)


def cells_on_original(grid: tuple[int, int], box: Box, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that give the whole picture the cell size the model's grid has inside `box`."""
    x0, y0, x1, y1 = box
    return max(1, round(grid[0] * size[1] / (y1 - y0))), max(1, round(grid[1] * size[0] / (x1 - x0)))


def resize_map(values: Array, shape: tuple[int, int]) -> Array:
    """Bilinear resize of (..., h, w) maps (pixel centres aligned as in torch's ``align_corners=False``)."""
    h, w = values.shape[-2:]
    return values if (h, w) == shape else to_original(values, (0, 0, w, h), (w, h), shape)


def fit_within(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(width, height) scaled down, never up, so that the longer side is at most `longest`."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def minmax(values: Array) -> Array:
    """Each (h, w) map of (..., h, w) scaled to [0, 1]; NaN stays NaN, a constant map becomes zeros."""
    values = np.asarray(values, np.float32)
    known = np.isfinite(values)
    low = np.where(known, values, np.inf).min((-2, -1), keepdims=True)
    high = np.where(known, values, -np.inf).max((-2, -1), keepdims=True)
    span = high - low
    flat = ~(span > 0)
    scaled = (values - np.where(flat, 0, low)) / np.where(flat, 1, span)
    return np.where(known, np.where(flat, 0, scaled), np.nan).astype(np.float32)


def peak(values: Array, size: tuple[int, int]) -> tuple[float, float] | None:
    """Centre (x, y), in pixels of a picture of `size` (width, height), of the strongest cell; None for a flat map."""
    if not np.isfinite(values).any() or np.nanmax(values) <= np.nanmin(values):
        return None
    row, column = np.unravel_index(np.nanargmax(values), values.shape)
    return (float((column + 0.5) * size[0] / values.shape[1]), float((row + 0.5) * size[1] / values.shape[0]))


def top_region(values: Array, size: tuple[int, int], q: float = 0.05) -> Box | None:
    """Box (x0, y0, x1, y1), in pixels of a picture of `size`, of the region that holds the peak.

    The region is the connected part, around the peak, of the strongest fraction `q` of the cells (0 < q <= 1).
    None for a flat map.
    """
    if not 0 < q <= 1:
        raise UserError("q out of range", given=q, remedy="give a fraction, 0 < q <= 1")
    if peak(values, size) is None:
        return None
    from scipy.ndimage import label

    filled = np.where(np.isfinite(values), values, -np.inf)
    n = max(1, round(q * int(np.isfinite(values).sum())))
    threshold = np.partition(filled.ravel(), -n)[-n]
    parts, _ = label(filled >= threshold, structure=np.ones((3, 3)))
    rows, columns = np.nonzero(parts == parts[np.unravel_index(filled.argmax(), filled.shape)])
    sx, sy = size[0] / values.shape[1], size[1] / values.shape[0]
    return (
        float(columns.min() * sx),
        float(rows.min() * sy),
        float((columns.max() + 1) * sx),
        float((rows.max() + 1) * sy),
    )


# --- heat ----------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _heat_table(colormap: str, opacity: float) -> NDArray[np.uint8]:
    """(256, 4) colours of a heat layer: opacity follows the value."""
    # A little above linear: middling values show, weak ones leave the picture readable.
    alpha = 255 * opacity * np.linspace(0, 1, 256) ** 0.8
    return np.column_stack([colour_table(colormap), alpha.round().astype(np.uint8)])


def heat_layer(values: Array, colormap: str = "turbo", opacity: float = 0.75) -> Image.Image:
    """RGBA picture of a [0, 1] map (h, w): colour and opacity follow the value, NaN is transparent."""
    level = np.nan_to_num(np.asarray(values, np.float32), nan=0.0).clip(0, 1)
    return Image.fromarray(_heat_table(colormap, opacity)[(level * 255 + 0.5).astype(np.uint8)], "RGBA")


def difference_layer(plain: Array, finer: Array, opacity: float = 0.85) -> Image.Image:
    """RGBA picture of finer - plain, both in [0, 1]: red where the contrast adds weight, blue where it takes some."""
    change = np.nan_to_num(np.asarray(finer, np.float32) - np.asarray(plain, np.float32), nan=0.0).clip(-1, 1)
    rgb = np.where(change[..., None] >= 0, GAINED, LOST).astype(np.uint8)
    alpha = (255 * opacity * np.abs(change) ** 0.7).round().astype(np.uint8)
    return Image.fromarray(np.dstack([rgb, alpha]), "RGBA")


def _blend(image: Image.Image, layer: Image.Image) -> Image.Image:
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def overlay(image: Image.Image, values: Array, colormap: str = "turbo", opacity: float = 0.75) -> Image.Image:
    """The picture with its map over it.

    Parameters
    ----------
    image
        Any Pillow image; the result has its size.
    values
        (h, w) map in [0, 1] that spans the whole picture, at any resolution; NaN is left clear.
    colormap
        One of `COLORMAPS`.
    opacity
        Opacity of the strongest value, 0 to 1; weaker values are clearer.
    """
    fine = resize_map(np.asarray(values, np.float32), (image.height, image.width))
    return _blend(image, heat_layer(fine, colormap, opacity))


def difference(image: Image.Image, plain: Array, finer: Array, opacity: float = 0.85) -> Image.Image:
    """The grey picture with finer - plain over it, red = gained, blue = lost; maps as in `overlay`."""
    size = (image.height, image.width)
    layer = difference_layer(resize_map(plain, size), resize_map(finer, size), opacity)
    return _blend(image.convert("L").convert("RGB"), layer)


def colour_bar(colormap: str, height: int, width: int = 14) -> Image.Image:
    """A vertical bar, 1 at the top and 0 at the bottom."""
    column = colour_table(colormap)[np.linspace(255, 0, height).round().astype(np.uint8)]
    return Image.fromarray(np.repeat(column[:, None], width, 1), "RGB")


# --- panels --------------------------------------------------------------------------------


def title(target: str, references: Sequence[str] = (), *gammas: float) -> str:
    """``A vs B, C, D (gamma 0.6)``; the target alone when nothing is subtracted."""
    strengths = [f"{gamma:g}" for gamma in gammas if gamma]
    if not references or not strengths:
        return target
    return f"{target} vs {', '.join(references)} (gamma {', '.join(strengths)})"


def _shorten(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """Cut a line that does not fit in its middle: the start names the target, the end the strength."""
    if draw.textlength(text, font) <= width:
        return text
    for keep in range(len(text) - 1, 2, -1):
        tail = min(14, keep // 3)
        short = text[: keep - tail].rstrip() + " … " + text[len(text) - tail :].lstrip()
        if draw.textlength(short, font) <= width:
            return short
    return text[:1]


def panel(
    tiles: Sequence[tuple[Image.Image, str]], heading: str = "", colormap: str | None = "turbo", height: int = 256
) -> Image.Image:
    """Pictures side by side at one height, a caption under each, a heading above and a colour bar at the right.

    Parameters
    ----------
    tiles
        (picture, caption) pairs, in the order shown.
    heading
        One line above; shortened in the middle where it does not fit.
    colormap
        Colour bar to draw, or None for no bar.
    height
        Height of the pictures in pixels.
    """
    if not tiles:
        raise UserError("panel without pictures", remedy="give at least one (picture, caption) pair")
    gap, caption_height, bar = 8, 22, 44 if colormap else 0
    head = 30 if heading else 0
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image, _ in tiles]
    width = sum(image.width for image in scaled) + gap * (len(scaled) + 1) + bar
    sheet = Image.new("RGB", (width, head + gap + height + caption_height), "white")
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text((gap, 8), _shorten(draw, heading, _font(15, True), width - 2 * gap), "black", _font(15, True))
    x = gap
    for image, (_, caption) in zip(scaled, tiles):
        sheet.paste(image.convert("RGB"), (x, head + gap))
        text = _shorten(draw, caption, _font(12), image.width)
        draw.text((x, head + gap + height + 4), text, (70, 70, 70), _font(12))
        x += image.width + gap
    if colormap:
        sheet.paste(colour_bar(colormap, height), (x, head + gap))
        draw.text((x + 18, head + gap - 2), "1", "black", _font(12))
        draw.text((x + 18, head + gap + height - 14), "0", "black", _font(12))
    return sheet


def data_uri(image: Image.Image, quality: int = 85) -> str:
    """The picture as a ``data:`` address, for pages that must stand alone."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=quality, method=2)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


# --- display of a CAMResult ----------------------------------------------------------------


def _array(value: Any) -> Array:
    """A tensor, array or nested list as float32 numpy, wherever it lives."""
    return np.asarray(value.detach().float().cpu() if hasattr(value, "detach") else value, np.float32)


def _backdrop(result: CAMResult, i: int, image: Image.Image | None) -> Image.Image:
    """The picture given, or a grey sheet of the map's aspect when the result carries none."""
    if image is not None:
        return image.convert("RGB")
    h, w = _array(result.maps)[i].shape[-2:]
    scale = 224 / max(h, w)
    return Image.new("RGB", (round(w * scale), round(h * scale)), (128, 128, 128))


def result_title(result: CAMResult, i: int, class_names: Sequence[str] | None = None) -> str:
    """Title of one image of a result: names where they are known, class ids otherwise."""
    names = class_names if class_names is not None else result.class_names

    def name(c: Any) -> str:
        return names[int(c)] if names else f"class {int(c)}"

    references = [name(d) for d in result.references[i]]
    gammas = result.gamma if isinstance(result.gamma, tuple) else (result.gamma,)
    return title(name(result.target[i]), references, *gammas)


def result_overlay(
    result: CAMResult, i: int = 0, image: Image.Image | None = None, colormap: str = "turbo", opacity: float = 0.75
) -> Image.Image:
    """Map `i` of a `CAMResult` over `image` (the picture as the model saw it, or the original when the maps are on it).

    A sweep's maps (B, gammas, H, W) become one panel.
    """
    maps = _array(result.maps)[i]
    picture = _backdrop(result, i, image)
    if maps.ndim == 2:
        return overlay(picture, minmax(maps), colormap, opacity)
    gammas = result.gamma if isinstance(result.gamma, tuple) else (result.gamma,)
    tiles = [(overlay(picture, minmax(m), colormap, opacity), f"gamma {g:g}") for m, g in zip(maps, gammas)]
    return panel(tiles, result_title(result, i), colormap)


def result_top_region(
    result: CAMResult, i: int = 0, q: float = 0.05, size: tuple[int, int] | None = None
) -> Box | None:
    """Box of the strongest region of map `i` (`top_region`), in pixels of `size` or, without it, of the map."""
    values = _array(result.maps)[i]
    if values.ndim == 3:
        values = values[-1]
    return top_region(values, size or (values.shape[1], values.shape[0]), q)


def result_html(result: CAMResult, images: Sequence[Image.Image] | None = None, limit: int = 12) -> str:
    """A small grid of overlays, for notebooks (``CAMResult._repr_html_``); at most `limit` pictures are shown."""
    from html import escape

    count = len(_array(result.maps))
    figures = []
    for i in range(min(count, limit)):
        picture = result_overlay(result, i, images[i] if images is not None else None)
        picture.thumbnail((640, 320))
        text = escape(result_title(result, i))
        figures.append(
            f'<figure style="margin:4px;display:inline-block;vertical-align:top;max-width:{max(picture.width, 160)}px">'
            f'<img alt="{text}" src="{data_uri(picture)}">'
            f'<figcaption style="font-size:12px">{text}</figcaption></figure>'
        )
    more = f"<p>{count - limit} more</p>" if count > limit else ""
    return f"<div>{''.join(figures)}{more}<p style='font-size:12px'>{escape(str(result.method))}</p></div>"


def show_result(result: CAMResult, images: Sequence[Image.Image] | None = None, limit: int = 12) -> Any:
    """Display a result: in a notebook as HTML, elsewhere in the system's picture viewer. Returns what was shown."""
    try:
        from IPython import get_ipython  # type: ignore[attr-defined, unused-ignore]
        from IPython.display import HTML, display

        if get_ipython() is not None:
            page = HTML(result_html(result, images, limit))
            display(page)
            return page
    except ImportError:
        pass  # a plain interpreter: fall through to the picture viewer
    count = min(len(_array(result.maps)), limit)
    tiles = [
        (result_overlay(result, i, images[i] if images is not None else None), result_title(result, i))
        for i in range(count)
    ]
    sheet = panel(tiles, f"{result.method}")
    sheet.show()
    return sheet

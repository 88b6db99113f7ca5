"""Pictures for reports: anything one can show, as encoded bytes; and the figures' shared style."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}
_EXTENSION = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif", "image/svg+xml": "svg"}
_MAX_SVG_BYTES = 1_000_000  # a scatter of many points is smaller, and quicker to draw, as pixels
_PIXEL_ART_SIDE = 128  # images up to this side are shown with hard pixels and kept lossless


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib settings of the reports' figures: light grid, no box, a colour-blind-safe cycle, repeatable SVG."""
    import matplotlib
    from cycler import cycler

    colours = ["#0b6e6e", "#d1682b", "#5b5ea6", "#b8912c", "#8c2d4f", "#4f7f3a", "#6b7280"]
    settings: Any = {
        "axes.prop_cycle": cycler(color=colours),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9aa0a6",
        "axes.labelcolor": "#3c4043",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": "medium",
        "axes.titlelocation": "left",
        "grid.color": "#e8eaed",
        "xtick.color": "#5f6368",
        "ytick.color": "#5f6368",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "figure.constrained_layout.use": True,
        "svg.hashsalt": "vfm-core",
    }
    with matplotlib.rc_context(settings):
        yield


@dataclass(frozen=True)
class Picture:
    """An encoded image: bytes, MIME type, (width, height) in px (``None`` for SVG) and alternative text."""

    data: bytes
    mime: str
    size: tuple[int, int] | None
    alt: str

    @property
    def uri(self) -> str:
        """The image as a data URI."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode('ascii')}"

    @property
    def extension(self) -> str:
        """File name extension, without the dot."""
        return _EXTENSION[self.mime]

    @property
    def pixelated(self) -> bool:
        """Whether enlarging should keep hard pixels."""
        return self.size is not None and max(self.size) <= _PIXEL_ART_SIDE


def encode_picture(obj: Any, alt: str = "") -> Picture:
    """Encode a picture for a report.

    Parameters
    ----------
    obj
        Matplotlib ``Figure`` (SVG, or PNG when the SVG is large), ``PIL.Image``, array or tensor (H,W) or (H,W,1|3|4)
        as uint8, bool or float in [0, 1], path of an image file, or a string that holds SVG.
    alt
        Alternative text.

    Raises
    ------
    TypeError
        For anything else.
    """
    if isinstance(obj, str) and obj.lstrip().startswith(("<svg", "<?xml")):
        return Picture(obj.encode(), "image/svg+xml", None, alt)
    if isinstance(obj, str | Path):
        return _encode_file(Path(obj), alt)
    if hasattr(obj, "savefig"):
        return _encode_figure(obj, alt)
    from PIL.Image import Image as PILImage

    if isinstance(obj, PILImage):
        return _encode_image(obj, alt)
    if hasattr(obj, "__array__"):
        return _encode_image(_image_of_array(obj), alt)
    raise TypeError(f"cannot show {type(obj).__name__}; give a matplotlib figure, PIL image, array, path or SVG text")


def _encode_file(path: Path, alt: str) -> Picture:
    from PIL import Image, UnidentifiedImageError

    try:
        if path.suffix.lower() == ".svg":
            return Picture(path.read_bytes(), "image/svg+xml", None, alt)
        with Image.open(path) as image:
            image.load()
            if path.suffix.lower() in _MIME:
                return Picture(path.read_bytes(), _MIME[path.suffix.lower()], image.size, alt)
            return _encode_image(image, alt)
    except (OSError, UnidentifiedImageError) as e:
        raise UserError("unreadable picture", where=path, given=e) from e


def _encode_figure(figure: Any, alt: str) -> Picture:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "vfm-core"}):  # same figure, same bytes
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    if buffer.tell() <= _MAX_SVG_BYTES:
        return Picture(buffer.getvalue(), "image/svg+xml", None, alt)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight")
    return Picture(buffer.getvalue(), "image/png", None, alt)


def _encode_image(image: Image, alt: str) -> Picture:
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    image = image.convert("RGBA" if has_alpha else "RGB")
    buffer = io.BytesIO()
    if max(image.size) <= _PIXEL_ART_SIDE:
        image.save(buffer, "PNG", optimize=True)
        return Picture(buffer.getvalue(), "image/png", image.size, alt)
    image.save(buffer, "WEBP", quality=90, method=4)
    return Picture(buffer.getvalue(), "image/webp", image.size, alt)


def _image_of_array(array: Any) -> Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))):
        raise TypeError(f"an array to show must be (H,W) or (H,W,1|3|4), got {values.shape}")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    elif values.dtype != np.uint8:
        values = (np.clip(np.nan_to_num(values.astype(np.float64)), 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(values)

"""Reading pictures: any file that Pillow opens becomes an upright 8-bit RGB picture, or an error that names the file.

Field photographs come from many cameras, scanners and microscopes. One rule per oddity, applied everywhere:

========================  =====================================================================================
EXIF orientation          applied, so that boxes and maps are in the upright picture's pixels
transparency              laid over white
CMYK, Lab, palette, ...   converted by Pillow
16-bit grey               divided by 257: the full range maps to the full range, never stretched per picture
32-bit grey (TIFF)        integers up to 255 are kept, up to 65535 divided by 257; floats up to 1 are multiplied by
                          255 first; anything beyond is clipped
animations, multi-page    first frame
========================  =====================================================================================
"""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vfm_core.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "is_image_file", "read_image", "read_label_map", "read_mask", "to_rgb"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
"""Lower-case file suffixes that count as images when a folder is listed."""

_log = logging.getLogger(__name__)


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Say whether a file name is that of an image: a known suffix, in any case, and not hidden."""
    name = os.path.basename(path)  # noqa: PTH119 - called once per file of large folders
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def read_image(source: str | os.PathLike[str] | bytes | BinaryIO, *, name: str | None = None) -> Image.Image:
    """Read one picture as upright 8-bit RGB.

    Parameters
    ----------
    source : path, bytes or binary file
        The file, its content, or an open file.
    name : str, optional
        What errors call the picture; by default the path.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, fully decoded, no file left open.

    Raises
    ------
    UserError
        The file is missing, unreadable, empty, truncated, corrupt, or not a picture; the message names it.
    """
    path = None if isinstance(source, bytes) or hasattr(source, "read") else Path(os.fspath(source))
    where = name or (str(path) if path is not None else "image data")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else path or source) as image:
            image.load()
            return to_rgb(_upright(image, where))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        raise _unreadable(error, where, path) from error


def read_mask(
    source: str | os.PathLike[str] | bytes, size: tuple[int, int] | None = None, *, name: str | None = None
) -> np.ndarray:
    """Read a mask picture as a boolean array: every pixel that is not zero is inside.

    Parameters
    ----------
    source : path or bytes
        A single-channel or colour picture; palette pictures are read by their palette index.
    size : tuple of int, optional
        Expected width and height in pixels.
    name : str, optional
        What errors call the picture; by default the path.

    Returns
    -------
    ndarray of bool, (H, W)

    Raises
    ------
    UserError
        Unreadable, or not of the expected size.
    """
    return read_label_map(source, size, name=name) != 0


def read_label_map(
    source: str | os.PathLike[str] | bytes, size: tuple[int, int] | None = None, *, name: str | None = None
) -> np.ndarray:
    """Read a picture whose pixel values are labels: grey values or palette indices, untouched.

    Parameters
    ----------
    source, size, name
        As for :func:`read_mask`.

    Returns
    -------
    ndarray of integers, (H, W)
        The largest channel value for colour pictures; transparency is ignored.

    Raises
    ------
    UserError
        Unreadable, or not of the expected size; the message names the file.
    """
    path = None if isinstance(source, bytes) else Path(source)
    where = name or (str(path) if path is not None else "mask data")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            file.load()
            image = _upright(file, where)
            if image.mode in ("LA", "PA", "RGBA"):
                image = image.convert({"LA": "L", "PA": "P", "RGBA": "RGB"}[image.mode])
            values = np.asarray(image)
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(error, where, path) from error
    values = values.max(axis=2) if values.ndim == 3 else values
    if size is not None and values.shape != (size[1], size[0]):
        raise UserError(
            "mask and image differ in size",
            where=where,
            given=f"{values.shape[1]}x{values.shape[0]} against {size[0]}x{size[1]} pixels",
            remedy="export the mask at the size of the upright image",
        )
    return values if values.dtype.kind == "u" else values.astype(np.int64)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB by the rules at the top of this module.

    Parameters
    ----------
    image : PIL.Image.Image
        Any mode; left untouched.

    Returns
    -------
    PIL.Image.Image
        Mode RGB; the same object when it is RGB already.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    sixteen_bit, is_float = values.dtype.itemsize == 2, values.dtype.kind == "f"
    values = np.nan_to_num(values.astype(np.float64))
    top = values.max(initial=0.0)
    if is_float and top <= 1:
        values = values * 255
    elif sixteen_bit or top > 255:
        values = values / 257
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _upright(image: Image.Image, where: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged EXIF block must not cost the picture
        _log.warning("EXIF block of %s is damaged (%s); the picture is used as stored", where, error)
        return image


def _unreadable(error: Exception, where: str, path: Path | None) -> UserError:
    remedy = "replace or remove the file"
    if isinstance(error, FileNotFoundError):
        return UserError("no such image file", given=where, remedy="check the path")
    if isinstance(error, PermissionError):
        return UserError("image file may not be read", given=where, remedy="check its permissions")
    if isinstance(error, IsADirectoryError):
        return UserError("a folder where an image file was expected", given=where, remedy="give the file")
    if isinstance(error, Image.DecompressionBombError):
        return UserError("image has too many pixels", given=where, remedy="downscale it")
    if path is not None and path.is_file() and path.stat().st_size == 0:
        return UserError("image file is empty", given=where, remedy=remedy)
    reason = str(error) or type(error).__name__
    return UserError(f"cannot read image ({reason})", given=where, remedy=remedy)

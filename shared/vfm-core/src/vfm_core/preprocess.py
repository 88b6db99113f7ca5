"""From a picture to a model's input and back: the inference preprocessing of timm, open_clip and transformers.

All three libraries do the same four things under different names: resize, centre crop or pad, scale to [0, 1],
normalise. :class:`Preprocess` holds that as plain data, so that it can be stored, compared and, above all, inverted:
``box`` says which part of the original picture the model has seen. Results are pixel-identical to
``timm.data.create_transform`` and ``open_clip.image_transform``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vfm_core.errors import UserError, unknown_name

__all__ = ["Interpolation", "Preprocess", "Resize", "shared_view"]

Resize = Literal["shortest", "squash", "longest", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True)
class Preprocess:
    """Inference preprocessing of one model.

    Parameters
    ----------
    size : tuple of int
        Height and width of the model input in pixels.
    resize : {"shortest", "squash", "longest", "none"}
        Before the centre crop, the picture is resized to ``floor(size / crop_pct)`` so that its shortest side fits
        (aspect kept), both sides fit (aspect lost), its longest side fits (aspect kept, then padded), or not at all.
    crop_pct : float
        Fraction of the resized picture that the centre crop keeps, in (0, 1].
    interpolation : str
        One of PIL's filters: nearest, bilinear, bicubic, lanczos, box, hamming.
    mean, std : tuple of float
        Per-channel statistics on the [0, 1] scale.
    fill : tuple of int
        RGB in 0..255 for padded borders.

    Raises
    ------
    UserError
        A value out of range.
    """

    size: tuple[int, int] = (224, 224)
    resize: Resize = "shortest"
    crop_pct: float = 1.0
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    fill: tuple[int, ...] = (0, 0, 0)

    def __post_init__(self) -> None:
        if len(self.size) != 2 or any(int(s) != s or s < 1 for s in self.size):
            raise UserError("size must be two positive whole numbers", where="preprocessing", given=self.size)
        if self.resize not in get_args(Resize):
            raise unknown_name("resize mode", self.resize, get_args(Resize), where="preprocessing")
        if self.interpolation not in _RESAMPLE:
            raise unknown_name("interpolation", self.interpolation, _RESAMPLE, where="preprocessing")
        if not 0 < self.crop_pct <= 1:
            raise UserError("crop_pct must be in (0, 1]", where="preprocessing", given=self.crop_pct)
        for name in ("mean", "std", "fill"):
            if len(getattr(self, name)) != 3:
                raise UserError(f"{name} must have three values", where="preprocessing", given=getattr(self, name))
        if not all(s > 0 for s in self.std):
            raise UserError("std must be positive", where="preprocessing", given=self.std)
        # JSON gives lists and ints; equal settings must compare and hash equal.
        object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))
        object.__setattr__(self, "crop_pct", float(self.crop_pct))
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))
        object.__setattr__(self, "fill", tuple(int(f) for f in self.fill))

    # ------------------------------------------------------------------ picture -> input
    def geometry(self, image: Image.Image) -> Tensor:
        """Resize and crop.

        Parameters
        ----------
        image : PIL.Image.Image
            Any mode; converted to RGB.

        Returns
        -------
        Tensor
            (3, h, w) float32 in [0, 1].
        """
        if not isinstance(image, Image.Image):
            raise UserError("expected a PIL image", given=type(image).__name__, remedy="open it with read_image(path)")
        image = image.convert("RGB") if image.mode != "RGB" else image
        resized, left, top = self._plan(image.size)
        if resized != image.size:
            image = image.resize(resized, _RESAMPLE[self.interpolation])
        h, w = self.size
        if (left, top) != (0, 0) or image.size != (w, h):
            if left < 0 or top < 0:
                canvas = Image.new("RGB", (w, h), self.fill)
                inside = image.crop((max(left, 0), max(top, 0), min(left + w, resized[0]), min(top + h, resized[1])))
                canvas.paste(inside, (max(-left, 0), max(-top, 0)))
                image = canvas
            else:
                image = image.crop((left, top, left + w, top + h))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels.permute(2, 0, 1).contiguous().float().div(255)

    def normalise(self, x: Tensor) -> Tensor:
        """Map (..., 3, H, W) from [0, 1] to the model's scale: ``(x - mean) / std``."""
        mean, std = self._statistics(x)
        return (x - mean) / std

    def denormalise(self, x: Tensor) -> Tensor:
        """Invert :meth:`normalise`: (..., 3, H, W) back to [0, 1]."""
        mean, std = self._statistics(x)
        return x * std + mean

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the model input (3, h, w) of one picture: ``normalise(geometry(image))``."""
        return self.normalise(self.geometry(image))

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=x.dtype, device=x.device).view(3, 1, 1)
        return mean, std

    # ------------------------------------------------------------------ input -> picture
    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part of the original picture that the model input covers.

        Parameters
        ----------
        size : tuple of int
            Width and height of the original picture in pixels (PIL's order).

        Returns
        -------
        tuple of float
            ``x0, y0, x1, y1`` in original pixels. The edges of the model input lie exactly there: input column ``u``
            in [0, w] is original ``x0 + u / w * (x1 - x0)``. Exceeds the picture where the input is padded.
        """
        (rw, rh), left, top = self._plan(size)
        h, w = self.size
        sx, sy = size[0] / rw, size[1] / rh
        return left * sx, top * sy, (left + w) * sx, (top + h) * sy

    def _plan(self, size: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
        """Return the resized (width, height) and the left and top of the crop in it; negative where padded."""
        width, height = size
        h, w = self.size
        th, tw = math.floor(h / self.crop_pct), math.floor(w / self.crop_pct)
        if self.resize == "none":
            rw, rh = width, height
        elif self.resize == "squash":
            rw, rh = tw, th
        elif self.resize == "shortest" and th == tw:
            # torchvision truncates the long side, where the general rule below rounds it.
            short, long = min(size), int(th * max(size) / min(size))
            rw, rh = (th, long) if short == width else (long, th)
        else:
            pick = max if self.resize == "longest" else min
            ratio = pick(height / th, width / tw)
            rw, rh = max(round(width / ratio), 1), max(round(height / ratio), 1)
        return (rw, rh), _offset(rw, w), _offset(rh, h)

    # ------------------------------------------------------------------ data
    def with_size(self, h: int, w: int) -> Preprocess:
        """Return the same preprocessing for another input size."""
        return dataclasses.replace(self, size=(h, w))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields; :meth:`from_dict` reads them back to an equal object."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preprocess:
        """Build from :meth:`to_dict`'s fields; absent ones keep their defaults.

        Raises
        ------
        UserError
            An unknown field or a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise unknown_name("field", name, known, where="preprocessing")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)


def _offset(have: int, want: int) -> int:
    # The integer rules of torchvision's center_crop and of timm's and open_clip's center_crop_or_pad.
    return -((want - have) // 2) if want > have else round((have - want) / 2.0)


def shared_view(
    preprocesses: Sequence[Preprocess],
) -> tuple[Callable[[Image.Image], Tensor], list[Callable[[Tensor], Tensor]]]:
    """Give several models the same view of a picture.

    Parameters
    ----------
    preprocesses : sequence of Preprocess
        One per model; all inputs must have the same aspect ratio.

    Returns
    -------
    geometry : callable
        Picture -> (3, H, W) in [0, 1], the geometry of the model with the largest input.
    adapt : list of callable
        One per model: (..., 3, H, W) in [0, 1] -> that model's input size and normalisation. Where the sizes agree,
        the pixels are passed on untouched.

    Raises
    ------
    UserError
        No models, or inputs of different aspect ratios.
    """
    if not preprocesses:
        raise UserError("a shared view needs at least one model")
    largest = max(preprocesses, key=lambda p: (max(p.size), min(p.size)))
    for p in preprocesses:
        if p.size[0] * largest.size[1] != p.size[1] * largest.size[0]:
            raise UserError(
                "a shared view needs inputs of one aspect ratio",
                given=f"{p.size} and {largest.size}",
                remedy="set img_size of one of the models",
            )
    return largest.geometry, [_adapter(p) for p in preprocesses]


def _adapter(p: Preprocess) -> Callable[[Tensor], Tensor]:
    mode = p.interpolation if p.interpolation in ("bilinear", "bicubic") else "bilinear"

    def adapt(x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != p.size:
            flat = x.reshape(-1, *x.shape[-3:])
            flat = torch.nn.functional.interpolate(flat, size=p.size, mode=mode, antialias=True, align_corners=False)
            x = flat.clamp(0, 1).reshape(*x.shape[:-2], *p.size)
        return p.normalise(x)

    return adapt

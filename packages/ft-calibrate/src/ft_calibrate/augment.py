"""The augmentation of FTC's and HT's Office-Home training (published code), driven by a generator of one's own.

Training: ``RandomResizedCrop(224, scale=(0.7, 1))``, ``RandomHorizontalFlip()``, ``ColorJitter(0.3, 0.3, 0.3, 0.3)``,
``RandomGrayscale(0.1)``. Test: a plain resize to 224 x 224 (squashed, no crop). The operations are torchvision's;
only the random numbers are drawn here, in torchvision's order, so that a generator in the state of torch's global one
gives the same picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from vfm_core.errors import UserError

__all__ = ["Augmentation", "Draw", "apply_draw", "squash"]

_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10


@dataclass(frozen=True)
class Draw:
    """What was drawn for one picture.

    Attributes
    ----------
    crop : tuple of int
        Top, left, height, width, in pixels of the picture.
    flip : bool
        Mirror left and right.
    order : tuple of int
        In which order colours are changed: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    brightness, contrast, saturation : float
        Factors; 1 changes nothing.
    hue : float
        Shift in turns of the colour circle, -0.5 to 0.5; 0 changes nothing.
    grey : bool
        Drop the colours.
    """

    crop: tuple[int, int, int, int]
    flip: bool
    order: tuple[int, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey: bool


@dataclass(frozen=True)
class Augmentation:
    """Random crop, mirroring, colours and greys: ``augment(picture, generator) -> picture``.

    Parameters
    ----------
    size : int
        Side of the result in pixels, at least 1.
    scale : tuple of float
        Least and greatest share of the picture's area that a crop keeps, in (0, 1].
    flip : float
        Probability of mirroring.
    jitter : float
        Brightness, contrast and saturation are multiplied by 1 - jitter to 1 + jitter, hue is shifted by up to jitter
        turns; 0 to 0.5.
    grey : float
        Probability of dropping the colours.

    Raises
    ------
    UserError
        A parameter out of range.

    Examples
    --------
    >>> import torch
    >>> from PIL import Image
    >>> augment = Augmentation(size=64)
    >>> augment(Image.new("RGB", (100, 80)), torch.Generator().manual_seed(0)).size
    (64, 64)
    """

    size: int = 224
    scale: tuple[float, float] = (0.7, 1.0)
    flip: float = 0.5
    jitter: float = 0.3
    grey: float = 0.1

    def __post_init__(self) -> None:
        low, high = self.scale
        for what, good in (
            ("size", self.size >= 1),
            ("scale", 0 < low <= high <= 1),
            ("flip", 0 <= self.flip <= 1),
            ("jitter", 0 <= self.jitter <= 0.5),
            ("grey", 0 <= self.grey <= 1),
        ):
            if not good:
                raise UserError("out of range", where=f"augmentation, {what}", given=getattr(self, what))

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Return the augmented picture, RGB, ``size`` x ``size``; the generator moves on, nothing else does."""
        return apply_draw(image, self.draw(image.size, generator), self.size)

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> Draw:
        """Draw for a picture of width x height ``size``.

        The numbers are drawn on the CPU in the order of torchvision 0.20 to 0.29.
        """
        crop = self._crop(size, generator)
        flip = bool(torch.rand(1, generator=generator) < self.flip)
        if self.jitter > 0:
            order = tuple(torch.randperm(4, generator=generator).tolist())
            low, high = 1 - self.jitter, 1 + self.jitter
            b, c, s = (_uniform(low, high, generator) for _ in range(3))
            hue = _uniform(-self.jitter, self.jitter, generator)
        else:
            order, b, c, s, hue = (), 1.0, 1.0, 1.0, 0.0
        grey = bool(torch.rand(1, generator=generator) < self.grey)
        return Draw(crop, flip, order, b, c, s, hue, grey)

    def _crop(self, size: tuple[int, int], generator: torch.Generator) -> tuple[int, int, int, int]:
        width, height = size
        log_ratio = torch.log(torch.tensor(_RATIO))
        for _ in range(_ATTEMPTS):
            area = height * width * _uniform(*self.scale, generator)
            ratio = torch.exp(torch.empty(1).uniform_(float(log_ratio[0]), float(log_ratio[1]), generator=generator))
            w = round(math.sqrt(area * float(ratio)))
            h = round(math.sqrt(area / float(ratio)))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
                left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
                return top, left, h, w
        # A picture too long for any crop of these proportions: the largest one in the middle.
        ratio_of_image = width / height
        h = height if ratio_of_image >= _RATIO[0] else round(width / _RATIO[0])
        w = width if ratio_of_image <= _RATIO[1] else round(height * _RATIO[1])
        return (height - h) // 2, (width - w) // 2, h, w


def apply_draw(image: Image.Image, draw: Draw, size: int) -> Image.Image:
    """Change a picture as drawn.

    Parameters
    ----------
    image : PIL.Image.Image
        RGB; left untouched.
    draw : Draw
        For a picture of this size.
    size : int
        Side of the result.

    Returns
    -------
    PIL.Image.Image
        RGB, ``size`` x ``size``.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tf

    image = tf.resized_crop(image, *draw.crop, [size, size], InterpolationMode.BILINEAR)
    if draw.flip:
        image = tf.hflip(image)
    for step in draw.order:
        if step == 0:
            image = tf.adjust_brightness(image, draw.brightness)
        elif step == 1:
            image = tf.adjust_contrast(image, draw.contrast)
        elif step == 2:
            image = tf.adjust_saturation(image, draw.saturation)
        else:
            image = tf.adjust_hue(image, draw.hue)
    return tf.rgb_to_grayscale(image, num_output_channels=3) if draw.grey else image


def squash(image: Image.Image, size: int = 224) -> Image.Image:
    """Resize a picture to ``size`` x ``size`` pixels without keeping its proportions: the test transform."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return float(torch.empty(1).uniform_(low, high, generator=generator))

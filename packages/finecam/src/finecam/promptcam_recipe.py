"""The published Prompt-CAM recipe: learning rates, epochs and views of the pictures (arXiv 2501.09333, its code)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from vfm_core.preprocess import Preprocess

__all__ = ["RECIPES", "Recipe", "paper_augment", "paper_preprocess"]


@dataclass(frozen=True)
class Recipe:
    """Published settings for one backbone and data set; ``top1`` is the published test accuracy in per cent."""

    lr: float
    epochs: int
    dropout: float
    top1: float


RECIPES: dict[str, Recipe] = {
    "dino/cub": Recipe(0.005, 130, 0.1, 73.2),
    "dino/cars": Recipe(0.01, 100, 0.1, 83.2),
    "dino/dogs": Recipe(0.005, 100, 0.1, 81.1),
    "dino/pet": Recipe(0.005, 100, 0.1, 91.3),
    "dino/birds525": Recipe(0.01, 100, 0.1, 98.8),
    "dinov2/cub": Recipe(0.001, 130, 0.0, 74.1),
    "dinov2/dogs": Recipe(0.005, 100, 0.0, 81.3),
    "dinov2/pet": Recipe(0.005, 100, 0.0, 92.7),
}
"""``backbone/data`` -> settings in the official README, for ViT-B/16 (DINO) and ViT-B/14 (DINOv2) at 224 pixels."""


def paper_preprocess(size: tuple[int, int] = (224, 224)) -> Preprocess:
    """The official evaluation view: squashed to the input size, mean and standard deviation 0.5."""
    return Preprocess(size=size, resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def paper_augment(size: tuple[int, int] = (224, 224)) -> Callable[[Image.Image, torch.Generator], Image.Image]:
    """The official training view: squash to 240/224 of the input size, random crop of the input size, random flip.

    Parameters
    ----------
    size : tuple of int
        Height and width of the model input.

    Returns
    -------
    callable
        ``(picture, generator) -> picture`` of exactly that size.
    """
    height, width = size
    tall, wide = round(height * 240 / 224), round(width * 240 / 224)

    def augment(image: Image.Image, generator: torch.Generator) -> Image.Image:
        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        top, left = draw(tall - height + 1), draw(wide - width + 1)
        image = image.resize((wide, tall), Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw(2) else image

    return augment

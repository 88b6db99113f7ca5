"""What a removed pixel becomes: nothing, a blur, the image's mean, or ROAD's guess from its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Fill = Literal["zero", "blur", "image_mean", "noisy_linear"] | Tensor
Filler = Callable[[Tensor, Tensor], Tensor]  # image indices (b,), removed pixels (b, H, W) -> images (b, C, H, W)

NOISE = 0.01  # of the ROAD imputation, in units of the normalised input


def make_filler(fill: Fill, x: Tensor, noise: float = NOISE, generator: torch.Generator | None = None) -> Filler:
    """Function that fills the removed pixels of chosen images of ``x`` (B, C, H, W).

    Parameters
    ----------
    fill
        ``"zero"`` (after normalisation the mean colour of the model's data), ``"blur"`` (Gaussian, sigma 5, kernel 11),
        ``"image_mean"`` (per channel), ``"noisy_linear"`` (`noisy_linear`), or a tensor that broadcasts to x.
    noise, generator
        Of ``"noisy_linear"``.

    Raises
    ------
    ValueError
        For another name.
    """
    if isinstance(fill, str) and fill == "noisy_linear":
        source = generator or torch.Generator().manual_seed(0)
        return lambda index, removed: noisy_linear(x[index], removed, noise, source)
    if isinstance(fill, Tensor):
        base = fill.to(x).expand_as(x)
    elif fill == "zero":
        base = torch.zeros_like(x)
    elif fill == "image_mean":
        base = x.mean((-2, -1), keepdim=True).expand_as(x)
    elif fill == "blur":
        from torchvision.transforms.v2.functional import gaussian_blur

        base = gaussian_blur(x, [11, 11], [5.0, 5.0])
    else:
        raise ValueError(f"fill must be zero, blur, image_mean, noisy_linear or a tensor, got {fill!r}")
    return lambda index, removed: torch.where(removed[:, None], base[index], x[index])


def noisy_linear(x: Tensor, removed: Tensor, noise: float = NOISE, generator: torch.Generator | None = None) -> Tensor:
    """ROAD's imputation: every removed pixel is the weighted mean of its eight neighbours, plus noise.

    The weights are 1/6 for the sides and 1/12 for the corners (renormalised at the border), which makes one symmetric
    positive definite system per image and channel. It is solved for all of them together by conjugate gradients on the
    device. With every pixel removed nothing is known and the fill is zero (plus noise).

    Parameters
    ----------
    x
        (B, C, H, W).
    removed
        (B, H, W) bool.
    noise
        Standard deviation, in units of x.
    generator
        Of the noise; ``None`` is a fresh one with seed 0.

    Returns
    -------
    Tensor
        (B, C, H, W), equal to x where nothing is removed.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    tiny = torch.finfo(kind).tiny
    unknown, values = removed[:, None].to(kind), x.to(kind)
    degree = _neighbours(torch.ones_like(unknown[:1]))
    b = unknown * _neighbours(values * (1 - unknown))

    # Conjugate gradients on A v = degree * v - neighbours(v), restricted to the unknown pixels.
    v, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    rr = (residual**2).sum((-2, -1), keepdim=True)
    goal = 1e-12 * rr  # a residual of 1e-6: errors below 1e-4, a hundredth of the noise
    for i in range(10 * (x.shape[-2] + x.shape[-1])):
        active = rr > goal
        if i % 8 == 0 and not active.any():  # asking costs a wait for the device
            break
        a_direction = unknown * (degree * direction - _neighbours(direction))
        curvature = (direction * a_direction).sum((-2, -1), keepdim=True)
        alpha = torch.where(active, rr / curvature.clamp_min(tiny), 0)
        v += alpha * direction
        residual -= alpha * a_direction
        rr, before = (residual**2).sum((-2, -1), keepdim=True), rr
        direction = residual + torch.where(active, rr / before.clamp_min(tiny), 0) * direction

    if noise > 0:
        generator = generator or torch.Generator().manual_seed(0)
        v += noise * torch.randn(v.shape, generator=generator, device=generator.device).to(v)
    return torch.where(removed[:, None], v.to(x.dtype), x)


def _neighbours(v: Tensor) -> Tensor:
    """Weighted sum over the eight neighbours: 1/6 sides, 1/12 corners, nothing from outside."""
    padded = nn.functional.pad(v, (1, 1, 1, 1))
    rows = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return (rows[..., :-2, :] + 2 * rows[..., 1:-1, :] + rows[..., 2:, :] - 4 * v) / 12

"""What the classifier loses when the pixels that a map ranks high are taken away. All values are per image, (B,).

Deletion and insertion are RISE's (arXiv 1806.07421), relative drop is Finer-CAM's (arXiv 2501.11309, eq. 10), average
drop and increase in confidence are Grad-CAM++'s (arXiv 1710.11063). p = softmax of the logits, S = the map resized
(bilinear) to the input, pixels ranked by (S descending, pixel index ascending).

All perturbed copies of all images form one stream of batches; the masks are made on the device from one sort per map.
``model`` is any callable from (b, 3, H, W) to logits; a module is put in eval mode for the call and restored. A
constant or non-finite map gives NaN: its ranking would be that of the pixel indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finecam.families import minmax, resize
from finecam.fills import Fill, Filler, make_filler
from finecam.layers import logits_of
from finecam.ranking import is_empty, pixel_count, pixel_ranks
from finecam.references import similar_classes

Model = Callable[[Tensor], Any]


class DeletionCurves(NamedTuple):
    """Probabilities while the top pixels are deleted, and the area between the two curves."""

    fractions: Tensor  # (n + 1,) of pixels deleted, 0 ... 1
    target: Tensor  # (B, n + 1) p of the target
    reference: Tensor  # (B, n + 1) p of the reference
    area: Tensor  # (B,) integral of target - reference


def deletion(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Tensor | int,
    steps: int = 50,
    fill: Fill = "zero",
    batch_size: int = 64,
) -> Tensor:
    """Area under p of the target while the top pixels are deleted in ``steps`` equal steps; lower is better.

    Parameters
    ----------
    model
        Images (b, 3, H, W) -> logits (b, C).
    x
        (B, 3, H, W), normalised for the model.
    maps
        (B, h, w) floats.
    target
        (B,) class ids, or one for all.
    steps
        n; p is taken with the fractions 0, 1/n, ..., 1 deleted and integrated by the trapezoid rule.
    fill
        What a deleted pixel becomes: ``"zero"`` (the mean colour of the model's data), ``"blur"``, ``"image_mean"``,
        ``"noisy_linear"`` (ROAD's imputation), or a tensor that broadcasts to x.
    batch_size
        Perturbed images per forward pass.

    Returns
    -------
    Tensor
        (B,) in [0, 1]; NaN for an empty map.
    """
    fractions, p = _curve(model, x, maps, as_class_ids(target, x), steps, fill, batch_size, insert=False)
    return nan_where_empty(torch.trapezoid(p[..., 0], fractions, dim=1), maps)


def insertion(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Tensor | int,
    steps: int = 50,
    fill: Fill = "blur",
    batch_size: int = 64,
) -> Tensor:
    """Area under p of the target while the top pixels are put into a blurred image; higher is better.

    Parameters and result as in `deletion`; ``fill`` is what the image starts as (default: Gaussian blur, sigma 5,
    kernel 11, as in RISE).
    """
    fractions, p = _curve(model, x, maps, as_class_ids(target, x), steps, fill, batch_size, insert=True)
    return nan_where_empty(torch.trapezoid(p[..., 0], fractions, dim=1), maps)


def deletion_curves(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Tensor | int,
    reference: Tensor | int,
    steps: int = 50,
    fill: Fill = "zero",
    batch_size: int = 64,
) -> DeletionCurves:
    """Probabilities of the target and of its most similar class while the top pixels are deleted (Finer-CAM, Fig. 5).

    Parameters as in `deletion`, ``reference`` (B,) being the similar class. NaN for an empty map.
    """
    classes = torch.cat([as_class_ids(target, x), as_class_ids(reference, x)], 1)
    fractions, p = _curve(model, x, maps, classes, steps, fill, batch_size, insert=False)
    p = nan_where_empty(p, maps)
    area = torch.trapezoid(p[..., 0] - p[..., 1], fractions, dim=1)
    return DeletionCurves(fractions, p[..., 0], p[..., 1], area)


def absolute_drop(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Tensor | int,
    q: float | Sequence[float] = 0.05,
    fill: Fill = "zero",
    batch_size: int = 64,
) -> Tensor:
    """p^c - p*^c, where * marks the image without the map's top fraction ``q`` of pixels.

    Parameters as in `deletion`. Returns (B,), or (B, len(q)) for several fractions, in [-1, 1].
    """
    drops = _drops(model, x, maps, as_class_ids(target, x), q, fill, batch_size)[..., 0]
    return drops if isinstance(q, Sequence) else drops[:, 0]


def relative_drop(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Tensor | int,
    reference: Tensor | int | None = None,
    q: float | Sequence[float] = 0.05,
    fill: Fill = "zero",
    batch_size: int = 64,
) -> Tensor:
    """Relative drop, RD = (p^c - p*^c) - (p^d - p*^d): the target loses, its look-alike d does not (Finer-CAM, eq. 10).

    Compare methods with the SAME d for all of them, plain ones included, and know that a map built against d is scored
    on d.

    Parameters
    ----------
    model, x, maps, target, fill, batch_size
        As in `deletion`.
    reference
        d: (B,) class ids or one for all; (B, T) takes the largest RD over T classes (see `other_classes`); ``None`` is
        the class whose logit is nearest to the target's.
    q
        Fraction of pixels removed, or several.

    Returns
    -------
    Tensor
        (B,), or (B, len(q)) for several fractions, in [-2, 2]; NaN for an empty map.
    """
    c = as_class_ids(target, x)
    d = nearest_class(model, x, c[:, 0], batch_size)[:, None] if reference is None else as_class_ids(reference, x)
    if (c == d).any():
        raise ValueError("reference equals the target in relative_drop")
    drops = _drops(model, x, maps, torch.cat([c, d], 1), q, fill, batch_size)
    rd = (drops[..., :1] - drops[..., 1:]).amax(-1)
    return rd if isinstance(q, Sequence) else rd[:, 0]


def nearest_class(model: Model, x: Tensor, target: Tensor, batch_size: int = 64) -> Tensor:
    """The class d != c with the smallest abs(y^d - y^c), the smaller id among equals; (B,)."""
    if len(x) == 0:
        return target
    with evaluating(model), torch.no_grad():
        y = torch.cat([logits_of(model(part)).float() for part in x.split(batch_size)])
    if y.shape[1] < 2:
        raise ValueError("a relative drop needs at least two classes")
    return similar_classes("logit", y, target.to(y.device), 1)[:, 0]


def other_classes(target: Tensor, num_classes: int) -> Tensor:
    """All classes but the target, (B, C - 1): as ``reference`` they make `relative_drop` the one with max over d."""
    every = torch.arange(num_classes, device=target.device).expand(len(target), -1)
    return every[every != target[:, None]].view(len(target), num_classes - 1)


def average_drop(model: Model, x: Tensor, maps: Tensor, target: Tensor | int, batch_size: int = 64) -> Tensor:
    """max(0, p - p') / p, with p' of the image multiplied by the map scaled to [0, 1]; (B,) in [0, 1], lower is better.

    Grad-CAM++ reports the mean over images, in per cent. NaN for an empty map.
    """
    before, after = _with_and_without_map(model, x, maps, target, batch_size)
    return nan_where_empty((before - after).clamp_min(0) / before.clamp_min(torch.finfo(before.dtype).tiny), maps)


def increase_in_confidence(model: Model, x: Tensor, maps: Tensor, target: Tensor | int, batch_size: int = 64) -> Tensor:
    """Whether p' of the image multiplied by the map exceeds p; (B,) 1 or 0, NaN for an empty map; higher is better."""
    before, after = _with_and_without_map(model, x, maps, target, batch_size)
    return nan_where_empty((after > before).to(before.dtype), maps)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a module in eval mode and restore every submodule's mode on exit; nothing for another callable."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    try:
        if training:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def as_class_ids(classes: Tensor | int, x: Tensor) -> Tensor:
    """Class ids as (B, K) on the device of x."""
    if isinstance(classes, int):
        classes = torch.full((len(x),), classes)
    if classes.is_floating_point() or classes.ndim not in (1, 2) or len(classes) != len(x):
        raise ValueError(f"class ids must be integers (B,) or (B, T) for B = {len(x)}, got {tuple(classes.shape)}")
    classes = classes.to(x.device).long()
    return classes[:, None] if classes.ndim == 1 else classes


def nan_where_empty(values: Tensor, maps: Tensor) -> Tensor:
    """``values`` (B, ...) with NaN for every image whose map is empty."""
    empty = is_empty(maps).to(values.device)
    return values.masked_fill(empty.view(-1, *[1] * (values.ndim - 1)), torch.nan)


def on_input(maps: Tensor, x: Tensor) -> Tensor:
    """S: the maps at the size and on the device of the input."""
    if x.ndim != 4 or len(maps) != len(x):
        raise ValueError(f"images must be (B, C, H, W) with one map each, got {tuple(x.shape)} and {tuple(maps.shape)}")
    return resize(maps.detach().to(x.device).float(), (x.shape[-2], x.shape[-1]))


def perturbed_probabilities(
    model: Model,
    x: Tensor,
    steps: int,
    removed: Callable[[Tensor, Tensor], Tensor],
    filler: Filler,
    classes: Tensor,
    batch_size: int,
) -> Tensor:
    """Probabilities (B, steps, K) of ``classes`` (B, K) on every perturbed copy of every image.

    ``removed(index, step)`` says which pixels (b, H, W) go from images ``index`` (b,) in steps ``step`` (b,).
    """
    if len(x) == 0:
        return x.new_zeros(0, steps, classes.shape[1])
    jobs = torch.arange(len(x) * steps, device=x.device)
    highest, lowest = int(classes.max()), int(classes.min())
    parts = []
    with evaluating(model), torch.no_grad():
        for job in jobs.split(batch_size):
            index, step = job // steps, job % steps
            p = logits_of(model(filler(index, removed(index, step)))).float().softmax(-1)
            if highest >= p.shape[-1] or lowest < 0:
                raise ValueError(f"class ids must lie in 0..{p.shape[-1] - 1}, got {lowest}..{highest}")
            parts.append(p.gather(1, classes[index]))
    return torch.cat(parts).view(len(x), steps, -1)


def _curve(
    model: Model, x: Tensor, maps: Tensor, classes: Tensor, steps: int, fill: Fill, batch_size: int, insert: bool
) -> tuple[Tensor, Tensor]:
    """Fractions (n + 1,) and probabilities (B, n + 1, K) along a deletion or insertion."""
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    ranks = pixel_ranks(on_input(maps, x))
    pixels = ranks.shape[1] * ranks.shape[2]
    counts = torch.tensor([pixel_count(i / steps, pixels) for i in range(steps + 1)], device=x.device)

    def removed(index: Tensor, step: Tensor) -> Tensor:
        top = ranks[index] < counts[step][:, None, None]
        return ~top if insert else top

    p = perturbed_probabilities(model, x, steps + 1, removed, make_filler(fill, x), classes, batch_size)
    return torch.linspace(0, 1, steps + 1, device=x.device), p


def _drops(
    model: Model, x: Tensor, maps: Tensor, classes: Tensor, q: float | Sequence[float], fill: Fill, batch_size: int
) -> Tensor:
    """Drops p - p* of the classes (B, K) for every fraction q; (B, len(q), K)."""
    ranks = pixel_ranks(on_input(maps, x))
    pixels = ranks.shape[1] * ranks.shape[2]
    fractions = list(q) if isinstance(q, Sequence) else [q]
    counts = torch.tensor([0, *(pixel_count(f, pixels) for f in fractions)], device=x.device)
    p = perturbed_probabilities(
        model,
        x,
        len(counts),
        lambda index, step: ranks[index] < counts[step][:, None, None],
        make_filler(fill, x),
        classes,
        batch_size,
    )
    return nan_where_empty(p[:, :1] - p[:, 1:], maps)


def _with_and_without_map(
    model: Model, x: Tensor, maps: Tensor, target: Tensor | int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Probability of the target on the image, and on the image multiplied by the map."""
    classes = as_class_ids(target, x)
    scaled = minmax(on_input(maps, x))[:, None].to(x.dtype)
    before, after = (class_probabilities(model, images, classes, batch_size) for images in (x, x * scaled))
    return before[:, 0], after[:, 0]


def class_probabilities(model: Model, x: Tensor, classes: Tensor, batch_size: int) -> Tensor:
    """Probabilities (B, K) of ``classes`` (B, K) on the images themselves."""

    def nothing(index: Tensor, step: Tensor) -> Tensor:
        return torch.zeros((len(index), *x.shape[-2:]), dtype=torch.bool, device=x.device)

    return perturbed_probabilities(model, x, 1, nothing, lambda index, removed: x[index], classes, batch_size)[:, 0]

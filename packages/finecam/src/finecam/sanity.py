"""Sanity checks of maps: do they depend on what the model learned, and do they beat maps that cannot know?

Model-parameter randomisation after Adebayo et al., "Sanity Checks for Saliency Maps" (arXiv 1810.03292): destroy the
parameters from the head downwards, one stage more at a time, and correlate each map with the original. A map that
stays the same explains the picture, not the model. The baselines, a random map and a central Gaussian, belong in every
table beside the methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from vfm_core.metrics import rank_correlation

from finecam.families import minmax, resize
from finecam.ranking import is_empty


class Cascade(NamedTuple):
    """Result of `randomization_cascade`."""

    stages: list[str]  # names, in the order of destruction
    spearman: Tensor  # (stages, B) rank correlation with the original maps, NaN where a map is empty


def parameter_stages(model: nn.Module) -> list[str]:
    """Stages of a model, head first: its direct children, with sequences and lists of blocks taken apart.

    Reverse order of definition, which is the reverse of execution for timm, torchvision, open_clip and transformers
    classifiers. Parameters that belong to no child (class token, position embedding) form the last stage, ``""``.
    """
    stages = [""] if any(True for _ in model.parameters(recurse=False)) else []
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            parts = [f"{name}.{i}" for i, _ in child.named_children()]
        else:
            parts = [name]
        stages += [part for part in parts if any(True for _ in model.get_submodule(part).parameters())]
    return stages[::-1]


def randomize_(module: nn.Module, generator: torch.Generator, recurse: bool = True) -> None:
    """Replace every parameter, in place, by Gaussian noise of the same mean and standard deviation.

    Keeping the two moments keeps activations in range, so that maps change because knowledge is gone, not because the
    network saturates.
    """
    with torch.no_grad():
        for parameter in module.parameters(recurse=recurse):
            values = parameter.detach().float()
            spread = values.std(correction=0) if values.numel() > 1 else values.abs().mean()
            noise = torch.randn(parameter.shape, generator=generator, device=generator.device).to(values)
            parameter.copy_(values.mean() + spread * noise)


def randomization_cascade(
    model: nn.Module,
    explain: Callable[[nn.Module], Tensor],
    stages: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> Cascade:
    """Rank correlation of the maps with the original ones while the model is destroyed from the head downwards.

    Parameters
    ----------
    model
        Left untouched; a copy is destroyed.
    explain
        Model -> maps (B, h, w), with targets (and references) fixed by the caller, for example
        ``lambda m: Explainer(m, layer)(x, target=c, references=d).maps``.
    stages
        Module names in the order of destruction, each on top of the earlier ones; default `parameter_stages`.
        ``""`` is the model's own parameters without its children's.
    generator
        Of the random parameters; ``None`` is a fresh one with seed 0.

    Returns
    -------
    Cascade
        Good maps fall to a correlation near zero after the first stages.

    Raises
    ------
    ValueError
        If a stage is no module of the model.
    """
    names = list(parameter_stages(model) if stages is None else stages)
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(f"stage {name!r} is no module of the model; stages are {parameter_stages(model)}")
    generator = generator or torch.Generator().manual_seed(0)
    original = explain(model)
    victim = copy.deepcopy(model)
    rows = []
    for name in names:
        randomize_(victim.get_submodule(name), generator, recurse=name != "")
        rows.append(map_rank_correlation(original, explain(victim)))
    return Cascade(names, torch.stack(rows) if rows else original.new_zeros(0, len(original)))


def map_rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman correlation of two sets of maps (B, h, w) over their pixels; (B,), NaN when one is empty."""
    if a.shape != b.shape:
        raise ValueError(f"maps of one shape are compared, got {tuple(a.shape)} and {tuple(b.shape)}")
    empty = (is_empty(a) | is_empty(b)).tolist()
    values = [float("nan") if skip else rank_correlation(x.flatten(), y.flatten()) for x, y, skip in zip(a, b, empty)]
    return torch.tensor(values, dtype=a.dtype, device=a.device)


def random_maps(
    batch: int, size: tuple[int, int], grid: tuple[int, int] | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Maps that know nothing: uniform noise, (batch, H, W) in [0, 1].

    ``grid`` (h, w) draws the noise at a method's feature resolution and enlarges it, which is the fair opponent of a
    smooth map. ``generator`` ``None`` is a fresh one with seed 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    noise = torch.rand((batch, *(grid or size)), generator=generator, device=generator.device)
    return minmax(resize(noise, size))


def center_gaussian(batch: int, size: tuple[int, int], sigma: float = 0.25) -> Tensor:
    """Maps that know only that photographers centre their subject: a Gaussian, (batch, H, W), 1 at the centre.

    ``sigma`` is the standard deviation as a fraction of each side.
    """
    if sigma <= 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    y, x = (((torch.arange(n) + 0.5) / n - 0.5) / sigma for n in size)
    return torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / 2).expand(batch, -1, -1)

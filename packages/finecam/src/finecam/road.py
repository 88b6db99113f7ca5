"""ROAD, "A Consistent and Efficient Evaluation Strategy for Attribution Methods" (arXiv 2202.00449).

Pixels are removed by percentile of the map and imputed from their neighbours, so that the model cannot read the mask
off a flat patch. Scores are changes of the target's probability, averaged over percentiles, per image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finecam.fills import NOISE, make_filler
from finecam.perturbation import Model, as_class_ids, nan_where_empty, on_input, perturbed_probabilities

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


def road_morf(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Tensor | int,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = NOISE,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
) -> Tensor:
    """ROAD, most relevant first: mean change of p when pixels with S at or above each percentile are imputed.

    Removed pixels become a weighted mean of their neighbours plus Gaussian noise (`finecam.fills.noisy_linear`), so
    that the mask's shape tells the model nothing. Negative when the map is good.

    Parameters
    ----------
    model, x, maps, target, batch_size
        As in `finecam.perturbation.deletion`.
    percentiles
        Each in (0, 100).
    noise
        Standard deviation, in units of x.
    generator
        Of the noise; ``None`` is a fresh one with seed 0.

    Returns
    -------
    Tensor
        (B,) in [-1, 1]; NaN for an empty map.
    """
    return _road(model, x, maps, target, percentiles, noise, generator, batch_size, least=False)


def road_lerf(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Tensor | int,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = NOISE,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
) -> Tensor:
    """ROAD, least relevant first: as `road_morf` with 1 - S. Near zero or positive when the map is good."""
    return _road(model, x, maps, target, percentiles, noise, generator, batch_size, least=True)


def road_combined(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Tensor | int,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = NOISE,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
) -> Tensor:
    """(`road_lerf` - `road_morf`) / 2, in [-1, 1]; higher is better."""
    generator = generator or torch.Generator().manual_seed(0)
    lerf, morf = (
        _road(model, x, maps, target, percentiles, noise, generator, batch_size, least) for least in (True, False)
    )
    return (lerf - morf) / 2


def _road(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Tensor | int,
    percentiles: Sequence[float],
    noise: float,
    generator: torch.Generator | None,
    batch_size: int,
    least: bool,
) -> Tensor:
    s = on_input(maps, x)
    s = 1 - s if least else s
    ordered = s.flatten(1).sort(1).values
    position = torch.tensor(list(percentiles), dtype=torch.float64, device=x.device) / 100 * (ordered.shape[1] - 1)
    low = position.floor().long()
    high = (low + 1).clamp_max(ordered.shape[1] - 1)
    thresholds = torch.lerp(ordered[:, low], ordered[:, high], (position - low).to(s.dtype))

    # Step 0 removes nothing and gives p itself.
    limits = torch.cat([torch.full_like(thresholds[:, :1], torch.inf), thresholds], 1)
    p = perturbed_probabilities(
        model,
        x,
        limits.shape[1],
        lambda index, step: s[index] >= limits[index, step][:, None, None],
        make_filler("noisy_linear", x, noise, generator),
        as_class_ids(target, x),
        batch_size,
    )[..., 0]
    return nan_where_empty((p[:, 1:] - p[:, :1]).mean(1), maps)

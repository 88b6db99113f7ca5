"""The published way to the seen-unseen curve, for parity tests and the bench only.

FTC's code (OSU-MLB/Fine-Tuning-Is-Fine-If-Calibrated) moves the absent logits just past one more sample at a time and
scores everything anew, O(N^2 K). These functions do what that code was seen to do, in our own words. Use
`ft_calibrate.curve` for anything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["published_ausuc", "published_curve"]


def published_curve(logits: Any, labels: Any, seen: Any, absent: Any, most: int | None = None) -> NDArray[np.float64]:
    """Points of the curve in the order of the published search: first up from gamma = 0, then down.

    Parameters
    ----------
    logits, labels
        (N, K) scores and (N,) columns.
    seen, absent
        Column numbers; both need samples.
    most
        Stop after this many points (for timing); None goes to both ends.

    Returns
    -------
    ndarray of float64
        (P, 4): overall, seen and absent accuracy in [0, 1], and gamma. The interval that holds gamma = 0 is missing
        unless the search finds nothing on one side; then that side's only point is gamma = 0 itself.
    """
    scores = torch.as_tensor(logits)
    y = torch.as_tensor(labels)
    s, u = torch.as_tensor(seen), torch.as_tensor(absent)
    of_seen, of_absent = torch.isin(y, s), torch.isin(y, u)
    points: list[list[float]] = []
    for direction in (1.0, -1.0):
        moved = scores.double().clone()
        gamma, last = 0.0, False
        while not last and (most is None or len(points) < most):
            step, last = _next_step(moved, s, u, direction)
            moved[:, u] += direction * step
            gamma += direction * step
            points.append([*_three_accuracies(moved, y, of_seen, of_absent), gamma])
    return np.array(points)


def _next_step(moved: Tensor, s: Tensor, u: Tensor, direction: float) -> tuple[float, bool]:
    """How far to the middle between the next two distinct margins, and whether that was the last step."""
    ahead = direction * (moved[:, s].max(dim=1).values - moved[:, u].max(dim=1).values)
    ahead = ahead[ahead >= 0].sort().values
    if len(ahead) == 0:
        return 0.0, True
    first = float(ahead[0])
    later = ahead[ahead != ahead[0]]
    if len(later) == 0:
        return first + 1.0, True
    return (first + float(later[0])) / 2, False


def _three_accuracies(moved: Tensor, y: Tensor, of_seen: Tensor, of_absent: Tensor) -> tuple[float, float, float]:
    # A copy and three full passes for every point: this is what makes it slow.
    copied = moved.clone()
    overall = int((copied.argmax(dim=1) == y).sum()) / len(y)
    seen = int((copied[of_seen].argmax(dim=1) == y[of_seen]).sum()) / int(of_seen.sum())
    absent = int((copied[of_absent].argmax(dim=1) == y[of_absent]).sum()) / int(of_absent.sum())
    return overall, seen, absent


def published_ausuc(points: NDArray[np.float64]) -> float:
    """Area under the points of `published_curve`: sorted by seen accuracy alone, then the trapezoid rule."""
    from sklearn.metrics import auc

    order = torch.argsort(torch.from_numpy(points[:, 1])).numpy()  # not stable: equal accuracies in any order
    return float(auc(points[order, 1], points[order, 2]))

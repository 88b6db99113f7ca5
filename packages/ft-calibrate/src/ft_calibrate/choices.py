"""Further ways to choose gamma from logits.

`val_gamma` is the best gamma on labelled data of all classes. On test data that is ``oracle``, FTC's gamma* (arXiv
2409.16223), an upper bound that cannot be deployed. The rest is ours, not from the paper: ``val`` takes a few labelled
samples of absent classes, ``rate`` unlabelled data and the share of absent samples that is expected among them. The
repairs that are no single gamma are in `ft_calibrate.repairs`.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

from ft_calibrate.curve import Curve, CurveBest, FloorNotReached, margins, seen_unseen_curve
from ft_calibrate.groups import ClassGroups
from ft_calibrate.inputs import as_scores
from ft_calibrate.repairs import labelled_rows

__all__ = ["ValGamma", "rate_gamma", "val_gamma"]

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
_RESAMPLED_ROWS = 20_000_000  # bound on rows x resamples of a bootstrap


@dataclass(frozen=True)
class ValGamma:
    """Gamma chosen on labelled data of both groups.

    Parameters
    ----------
    gamma : float
        Midpoint of the best plateau.
    ci95 : (float, float) or None
        Percentile bootstrap interval, samples redrawn within S and within U.
    best : CurveBest
        Plateau and value of the criterion.
    n_seen, n_absent : int
        Labelled samples of each group.
    """

    gamma: float
    ci95: tuple[float, float] | None
    best: CurveBest
    n_seen: int
    n_absent: int


def _curve(z: NDArray[Any], y: NDArray[np.int64], groups: ClassGroups, remaining: str) -> Curve:
    return seen_unseen_curve(z, y, groups.seen, groups.absent, classes=groups.classes, remaining=remaining)


def val_gamma(
    logits: Any,
    labels: Any,
    groups: ClassGroups,
    criterion: str = "overall",
    remaining: str = "absent",
    floor: float | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    purpose: str = "method val",
) -> ValGamma:
    """The best gamma on labelled samples of seen and absent classes, with its bootstrap interval (ours).

    Parameters
    ----------
    logits, labels
        (N, K) and (N,), with samples of S and of U; those of remaining classes do not count. Data kept apart from the
        test data, except for the upper bound.
    groups
        The classes of the head.
    criterion : {"overall", "balanced", "harmonic", "source-floor"}
        What is maximised.
    remaining : {"absent", "keep", "exclude"}
        What happens to remaining classes.
    floor
        Least accuracy on U, in [0, 1], for ``"source-floor"``.
    n_bootstrap
        Resamples; 0: no interval. Fewer are drawn (at least 100) when rows times resamples exceed 2e7.
    seed
        Of the resampling.
    purpose
        Who asks, for messages.

    Returns
    -------
    ValGamma

    Raises
    ------
    UserError
        No labelled sample in a group, or bad input.
    """
    z, y, is_absent = labelled_rows(logits, labels, groups, purpose)
    best = _curve(z, y, groups, remaining).best(criterion, floor)
    ci95 = None
    if n_bootstrap > 0:
        gammas = _resampled(z, y, is_absent, groups, criterion, remaining, floor, n_bootstrap, seed)
        low, high = np.quantile(gammas, [0.025, 0.975])
        ci95 = (float(low), float(high))
    return ValGamma(best.gamma, ci95, best, int((~is_absent).sum()), int(is_absent.sum()))


def _resampled(
    z: NDArray[Any],
    y: NDArray[np.int64],
    is_absent: NDArray[np.bool_],
    groups: ClassGroups,
    criterion: str,
    remaining: str,
    floor: float | None,
    n: int,
    seed: int,
) -> Floats:
    """The best gamma of ``n`` bootstrap samples; samples are redrawn within each group."""
    n = min(n, max(100, _RESAMPLED_ROWS // len(y)))
    d = margins(z, groups, remaining)
    breaks = np.unique(d[np.isfinite(d)])
    first = np.searchsorted(breaks, d) + 1  # the interval from which a sample counts as absent
    first[d == -np.inf], first[~(d < np.inf)] = 0, len(breaks) + 1
    right = _right(z, y, is_absent, groups, remaining)
    rows = [np.flatnonzero(~is_absent), np.flatnonzero(is_absent)]
    full = _curve(z, y, groups, remaining)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        below = []  # per group: share of right samples that count as absent at every gamma, (M + 1,)
        for r in rows:
            drawn = r[rng.integers(0, len(r), len(r))]
            counts = np.bincount(first[drawn], weights=right[drawn], minlength=len(breaks) + 2)
            below.append(np.cumsum(counts) / len(r))
        seen, unseen = below[0][-1] - below[0][:-1], below[1][:-1]
        with contextlib.suppress(FloorNotReached):
            found.append(replace(full, seen=seen, unseen=unseen).best(criterion, floor).gamma)
    return np.asarray(found or [np.nan])


def _right(
    z: NDArray[Any], y: NDArray[np.int64], is_absent: NDArray[np.bool_], groups: ClassGroups, remaining: str
) -> Floats:
    """1 where the best column of the sample's own side (fixed or moved) is the label, (N,)."""
    fixed, moved = groups.fixed(remaining), groups.moved(remaining)
    best = np.where(is_absent, moved[z[:, moved].argmax(axis=1)], fixed[z[:, fixed].argmax(axis=1)])
    return (best == y).astype(np.float64)


def rate_gamma(logits: Any, pi_absent: float, groups: ClassGroups, remaining: str = "absent") -> float:
    """The gamma with which a share ``pi_absent`` of unlabelled samples is predicted as absent (ours).

    gamma is the pi-quantile of d_i = max over fixed columns - max over moved columns, taken between two samples (with
    ties: at the gap whose share is nearest).

    Parameters
    ----------
    logits
        (N, K) of unlabelled target data.
    pi_absent
        Expected share of samples of moved classes, in [0, 1].
    groups, remaining
        The classes of the head.

    Returns
    -------
    float
        In logit units; 0 when nothing is absent.

    Raises
    ------
    UserError
        A share outside [0, 1], no rows, or bad input.
    """
    if not 0 <= pi_absent <= 1:
        raise UserError("the share of absent samples must lie in [0, 1]", where="rate", given=pi_absent)
    z = as_scores(logits, groups.num_classes, classes=groups.classes)
    if len(z) == 0:
        raise UserError("method rate needs logits of unlabelled target data", given="no rows")
    if len(groups.moved(remaining)) == 0:
        return 0.0
    values, counts = np.unique(margins(z, groups, remaining), return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # samples predicted as absent in each gap
    gap = int(np.abs(below - pi_absent * len(z)).argmin())
    if gap == 0:
        return float(values[0] - 1)
    return float(values[-1] + 1) if gap == len(values) else float((values[gap - 1] + values[gap]) / 2)

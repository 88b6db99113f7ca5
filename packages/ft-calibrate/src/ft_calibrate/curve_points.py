"""A seen-unseen curve at hand: its points, its area, and the gamma that a criterion picks on it.

FTC (arXiv 2409.16223): AUSUC and the oracle gamma*, the argmax of the overall accuracy; ``source-floor`` is the rule of
the published code for pseudo cross-validation. The middle of the plateau (the published code returns one end of it) and
the balanced and harmonic criteria are ours. `ft_calibrate.curve` makes these curves.
"""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError, unknown_name
from vfm_core.files import atomic_write
from vfm_core.metrics import harmonic_mean

__all__ = ["CRITERIA", "Curve", "CurveBest", "CurvePoint", "FloorNotReached"]

CRITERIA = ("overall", "balanced", "harmonic", "source-floor")
COLUMNS = ("gamma", "acc_seen", "acc_unseen", "acc_overall", "harmonic")
_EQUAL = 1e-12  # criteria closer than this are one plateau: sums of fractions in another order

Floats = NDArray[np.float64]


class FloorNotReached(UserError):
    """No gamma gives the absent classes the accuracy that was asked for."""


@dataclass(frozen=True)
class CurvePoint:
    """One point of the curve: gamma and the accuracies there, in [0, 1] or NaN for an empty group."""

    gamma: float
    seen: float
    unseen: float
    overall: float
    balanced: float
    harmonic: float

    def to_dict(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class CurveBest:
    """The gamma that a criterion picks.

    Parameters
    ----------
    gamma : float
        Middle of the plateau (logit units).
    low, high : float
        Open ends of the plateau; infinite at the ends of the curve.
    value : float
        Of the criterion there.
    point : CurvePoint
        The accuracies at gamma.
    """

    gamma: float
    low: float
    high: float
    value: float
    point: CurvePoint

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, JSON-ready but for infinities."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Curve:
    """Accuracy on seen and absent samples at every gamma that makes a difference.

    Parameters
    ----------
    gamma : ndarray of float64
        (M+1,) increasing; one value inside each interval of constant accuracy.
    seen, unseen : ndarray of float64
        (M+1,) Acc_{S/Y} (falls) and Acc_{U/Y} (rises) in [0, 1]; all NaN when the group has no sample.
    n_seen, n_unseen : int
        Samples of each group.
    breaks : ndarray of float64
        (M,) increasing: the distinct d, where one interval ends and the next begins.
    rest : ndarray of float64
        (M+1,) the same accuracy for samples of the remaining classes (ours); all NaN when there are none.
    n_rest : int
        Samples of the remaining classes; they count in ``rest`` only.
    """

    gamma: Floats
    seen: Floats
    unseen: Floats
    n_seen: int
    n_unseen: int
    breaks: Floats
    rest: Floats = field(default_factory=lambda: np.empty(0))
    n_rest: int = 0

    def __len__(self) -> int:
        """Number of points, M + 1."""
        return len(self.gamma)

    @property
    def overall(self) -> Floats:
        """(M+1,) (N_S Acc_{S/Y} + N_U Acc_{U/Y}) / (N_S + N_U); NaN without samples of S and U.

        Samples of the remaining classes do not count here, so that gamma is the same with and without them; they do in
        ``Y/Y`` of `ft_calibrate.metrics.accuracy_decomposition`.
        """
        right = np.zeros(len(self))
        for share, count in ((self.seen, self.n_seen), (self.unseen, self.n_unseen)):
            if count:
                right = right + np.rint(share * count)  # counts: equal accuracies stay exactly equal
        total = self.n_seen + self.n_unseen
        return right / total if total else np.full(len(self), np.nan)

    @property
    def balanced(self) -> Floats:
        """(M+1,) mean of the seen and the absent accuracy."""
        return (self.seen + self.unseen) / 2

    @property
    def harmonic(self) -> Floats:
        """(M+1,) harmonic mean of the seen and the absent accuracy."""
        return np.asarray(harmonic_mean(self.seen, self.unseen))

    @property
    def ausuc(self) -> float:
        """Area under the curve of absent over seen accuracy, in [0, 1]; NaN when a group has no sample."""
        if not (self.n_seen and self.n_unseen):
            return float("nan")
        return float(np.sum((self.seen[:-1] - self.seen[1:]) * (self.unseen[:-1] + self.unseen[1:]) / 2))

    def at(self, gamma: float) -> CurvePoint:
        """The accuracies at one gamma; where it equals a d, the fixed column wins (absent iff gamma > d)."""
        if np.isnan(gamma):
            raise UserError("gamma must be a number", given=gamma)
        return self._point(int(np.searchsorted(self.breaks, gamma, side="left")), float(gamma))

    def _point(self, i: int, gamma: float) -> CurvePoint:
        gammas, seen, unseen, rest = (a[i : i + 1] for a in (self.gamma, self.seen, self.unseen, self.rest))
        one = Curve(gammas, seen, unseen, self.n_seen, self.n_unseen, self.breaks[:0], rest, self.n_rest)
        values = (one.seen, one.unseen, one.overall, one.balanced, one.harmonic)
        return CurvePoint(gamma, *(float(value[0]) for value in values))

    def best(self, criterion: str = "overall", floor: float | None = None) -> CurveBest:
        """The gamma where a criterion is greatest: the middle of its plateau.

        Parameters
        ----------
        criterion
            ``"overall"``, ``"balanced"``, ``"harmonic"``, or ``"source-floor"``: the greatest overall accuracy among
            the gammas whose absent accuracy is at least ``floor``.
        floor
            Least absent accuracy, in [0, 1]; for ``"source-floor"`` that of the source model.

        Returns
        -------
        CurveBest
            Of several plateaus of one height the longest finite one counts, then the first. A plateau that is open to
            one side has no middle: gamma lies 1 beyond its finite end. Where every gamma is as good as any other,
            it is 0.

        Raises
        ------
        UserError
            Unknown criterion, ``"source-floor"`` without a floor (or a floor without it), or a criterion that needs
            samples of a group that has none.
        FloorNotReached
            No gamma reaches the floor.
        """
        value = self._criterion(criterion, floor)
        top = np.nanmax(value)
        good = np.concatenate([[False], value >= top - _EQUAL, [False]])
        starts, ends = np.flatnonzero(good[1:] & ~good[:-1]), np.flatnonzero(good[:-1] & ~good[1:])  # [start, end)
        edges = np.concatenate([[-np.inf], self.breaks, [np.inf]])
        low, high = edges[starts], edges[ends]
        length = high - low
        finite = np.isfinite(length)
        pick = int(np.argmax(np.where(finite, length, -1.0))) if finite.any() else 0
        gamma = self._middle(float(low[pick]), float(high[pick]))
        return CurveBest(gamma, float(low[pick]), float(high[pick]), float(top), self.at(gamma))

    def _criterion(self, criterion: str, floor: float | None) -> Floats:
        if criterion not in CRITERIA:
            raise unknown_name("criterion", criterion, CRITERIA)
        if (criterion == "source-floor") != (floor is not None):
            raise UserError(
                "a floor belongs to the criterion source-floor, and only to it",
                given=f"criterion {criterion}, floor {floor}",
                remedy="give the absent accuracy of the source model as the floor",
            )
        needs = {"overall": (), "source-floor": ("absent",)}.get(criterion, ("seen", "absent"))
        counts = {"seen": self.n_seen, "absent": self.n_unseen}
        for group in needs:
            if counts[group] == 0:
                raise UserError(
                    f"the criterion {criterion} needs samples of the {group} classes",
                    remedy="use the criterion overall",
                )
        if np.isnan(self.overall).any():
            raise UserError("the curve has no sample", remedy="give labelled samples of seen or absent classes")
        if floor is None:
            return np.asarray(getattr(self, criterion))
        allowed = self.unseen >= floor - _EQUAL
        if not allowed.any():
            raise FloorNotReached(
                "no gamma reaches the floor of the absent accuracy",
                given=f"{floor:.4g} with at most {self.unseen[-1]:.4g}",
                remedy="leave this fold out, or choose another criterion",
            )
        return np.where(allowed, self.overall, -np.inf)

    def _middle(self, low: float, high: float) -> float:
        if np.isinf(low) and np.isinf(high):
            middle = 0.0
        elif np.isinf(low):
            middle = high - 1.0
        else:
            middle = low + 1.0 if np.isinf(high) else low + (high - low) / 2
        at = int(np.searchsorted(self.breaks, middle))
        if at < len(self.breaks) and self.breaks[at] == middle:
            # There some sample ties between the groups: step into the wider of the two neighbouring intervals.
            below = self.breaks[at - 1] if at > 0 else middle - 2
            above = self.breaks[at + 1] if at + 1 < len(self.breaks) else middle + 2
            middle = (middle + (below if middle - below > above - middle else above)) / 2
        return float(middle)

    def rows(self) -> list[dict[str, float]]:
        """The points as dicts, in order of gamma: gamma, acc_seen, acc_unseen, acc_overall, harmonic."""
        return [dict(zip(COLUMNS, values)) for values in zip(*(a.tolist() for a in self._columns()))]

    def _columns(self) -> tuple[Floats, ...]:
        return self.gamma, self.seen, self.unseen, self.overall, self.harmonic

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the points as CSV (atomically) with the columns of `rows`; NaN is an empty field."""
        path = Path(path)
        with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for values in zip(*(a.tolist() for a in self._columns())):
                writer.writerow(["" if v != v else repr(v) for v in values])
        return path

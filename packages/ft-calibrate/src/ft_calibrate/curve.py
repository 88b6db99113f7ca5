"""The seen-unseen curve, its area (AUSUC) and the best gamma on it, exactly and in O(NK + N log N).

FTC (arXiv 2409.16223): the prediction is argmax_c z_c + gamma * 1[c in U]; as gamma goes from -inf to +inf the point
(Acc_{S/Y}, Acc_{U/Y}) walks from (Acc_{S/S}, 0) to (0, Acc_{U/U}). The published code shifts the logits once per
sample, O(N^2 K), leaves out the interval that holds gamma = 0 and sorts by seen accuracy alone; this is the closed form
of the same points:

1. d_i = max_F z_i - max_M z_i (F the columns without gamma, M those with it; without remaining classes F = S, M = U);
   a_i = 1[y_i in F and the best column of F is y_i], b_i = 1[y_i in M and the best column of M is y_i].
2. Sample i is predicted as absent iff gamma > d_i, so every accuracy is constant on the open intervals between
   consecutive distinct d. Each interval stands for itself by its midpoint; the ends by d_min - 1 and d_max + 1.
3. AUSUC is the trapezoid sum over these M + 1 points in order of gamma.

Inside an open interval no column of F ties with one of M; within a group the first of equal columns wins, as with
`numpy.argmax`. NaN scores count as -inf, and a sample without any finite score is never right. What happens to the
remaining classes is ours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

from ft_calibrate.curve_points import CRITERIA, Curve, CurveBest, CurvePoint, FloorNotReached
from ft_calibrate.groups import ClassGroups, Columns, label_columns
from ft_calibrate.metrics import as_groups, score_chunks, take_columns, warn_nan

__all__ = [
    "CRITERIA",
    "Curve",
    "CurveAccumulator",
    "CurveBest",
    "CurvePoint",
    "FloorNotReached",
    "ausuc",
    "margins",
    "seen_unseen_curve",
]

log = logging.getLogger(__name__)

_LOST, _FIXED, _MOVED = 0, 1, 2  # wrong on both sides; right while the best fixed / moved column wins

Floats = NDArray[np.float64]


def margins(logits: Any, groups: ClassGroups, remaining: str = "absent") -> Floats:
    """d_i = max_F z_i - max_M z_i for every sample: the gamma above which it is predicted as absent.

    Parameters
    ----------
    logits
        (N, K) scores; NaN counts as -inf.
    groups
        The columns; F are ``groups.fixed(remaining)``, M ``groups.moved(remaining)``.
    remaining
        What happens to the columns R.

    Returns
    -------
    ndarray of float64
        (N,) in logit units; -inf (inf) where no fixed (moved) column has a score, NaN where neither has.

    Raises
    ------
    UserError
        A score is +inf, or the number of columns differs.
    """
    as_groups(_shape(logits)[1], groups)
    fixed, moved = groups.fixed(remaining), groups.moved(remaining)
    parts, missing = [], 0
    for part, block in score_chunks(logits):
        d, _, _, nan = _best(block, fixed, moved, part.start)
        parts.append(d)
        missing += nan
    warn_nan(missing)
    return np.concatenate(parts) if parts else np.empty(0)


class CurveAccumulator:
    """The curve of samples that arrive in blocks: two numbers per sample are kept, never the logits.

    Parameters
    ----------
    groups : ClassGroups
        The columns.
    remaining : str
        What happens to the columns R. Samples of R count in ``rest`` only; with ``"exclude"`` they are left out.

    Examples
    --------
    >>> from ft_calibrate.groups import class_groups
    >>> curve = CurveAccumulator(class_groups(2, [0])).add([[2.0, 1.0], [3.0, 1.0]], [0, 1]).curve()
    >>> curve.best().gamma, curve.best("balanced").point.seen
    (0.0, 1.0)
    """

    def __init__(self, groups: ClassGroups, remaining: str = "absent") -> None:
        self.groups = groups
        self._fixed, self._moved = groups.fixed(remaining), groups.moved(remaining)
        side = np.zeros(groups.num_classes, dtype=np.int8)
        side[self._fixed], side[self._moved] = _FIXED, _MOVED
        self._side = side
        self._kind = np.zeros(groups.num_classes, dtype=np.int8)  # 0 seen, 1 absent, 2 remaining
        self._kind[groups.absent], self._kind[groups.remaining] = 1, 2
        self._d: list[Floats] = []
        self._code: list[NDArray[np.int8]] = []  # 3 * kind + outcome
        self._rows = 0

    def __len__(self) -> int:
        """Number of samples kept."""
        return sum(len(d) for d in self._d)

    def add(self, logits: Any, labels: Any) -> CurveAccumulator:
        """Add samples: logits (n, K) and labels (n,), names or columns; samples without a label are left out.

        Returns
        -------
        CurveAccumulator
            Itself.

        Raises
        ------
        UserError
            Wrong shapes, unknown labels, or a score of +inf.
        """
        shape = _shape(logits)
        as_groups(shape[1], self.groups)
        y = label_columns(labels, self.groups.classes, rows=shape[0])
        missing = 0
        for part, block in score_chunks(logits):
            d, best_fixed, best_moved, nan = _best(block, self._fixed, self._moved, self._rows + part.start)
            missing += nan
            label = y[part]
            outcome = np.zeros(len(label), dtype=np.int8)
            outcome[best_fixed == label] = _FIXED
            outcome[best_moved == label] = _MOVED
            keep = (label >= 0) & (self._side[label] > 0)
            self._d.append(d[keep])
            self._code.append((3 * self._kind[label] + outcome)[keep])
        self._rows += shape[0]
        warn_nan(missing)
        return self

    def curve(self) -> Curve:
        """The curve of all samples so far, in O(n log n)."""
        d = np.concatenate([*self._d, np.empty(0)])
        code = np.concatenate([*self._code, np.empty(0, np.int8)])
        breaks = np.unique(d[np.isfinite(d)])
        # Interval 0 lies below all breaks. A sample counts as absent from the interval after its d on; d = -inf always,
        # +inf and NaN (no score, outcome "lost") never.
        first = np.searchsorted(breaks, d, side="left") + 1
        first[d == -np.inf] = 0
        first[~(d < np.inf)] = len(breaks) + 1
        counts, shares = [], []
        for kind in range(3):
            total = int((code // 3 == kind).sum())
            lost = np.bincount(first[code == 3 * kind + _FIXED], minlength=len(breaks) + 2)
            won = np.bincount(first[code == 3 * kind + _MOVED], minlength=len(breaks) + 2)
            right = lost.sum() + np.cumsum(won - lost)[:-1]
            counts.append(total)
            shares.append(right / total if total else np.full(len(breaks) + 1, np.nan))
        return Curve(_representatives(breaks), shares[0], shares[1], counts[0], counts[1], breaks, shares[2], counts[2])


def seen_unseen_curve(
    logits: Any,
    labels: Any,
    seen: Any,
    absent: Any = None,
    *,
    classes: Sequence[str] | None = None,
    remaining: str = "absent",
) -> Curve:
    """The exact seen-unseen curve of scores (N, K), in O(NK + N log N).

    Parameters
    ----------
    logits
        Scores (N, K): array, memory map, tensor or lists; read in blocks.
    labels
        (N,) class names or column numbers; samples without a label are left out.
    seen, absent
        The groups, as `class_groups` takes them, or one `ClassGroups` as ``seen``.
    classes
        Names of the K columns; default ``"0"`` .. ``"K-1"``.
    remaining
        Columns that are neither: ``"absent"`` moves them with gamma, ``"keep"`` leaves them in the competition,
        ``"exclude"`` masks them out.

    Returns
    -------
    Curve

    Examples
    --------
    >>> curve = seen_unseen_curve([[3.0, 1.0], [3.0, 2.0]], [0, 1], seen=[0])
    >>> curve.gamma.tolist(), curve.ausuc, curve.best().gamma
    ([0.0, 1.5, 3.0], 1.0, 1.5)
    """
    groups = as_groups(_shape(logits)[1], seen, absent, classes)
    curve = CurveAccumulator(groups, remaining).add(logits, labels).curve()
    for count, name in ((curve.n_seen, "seen"), (curve.n_unseen, "absent")):
        if count == 0:
            log.warning("no sample of the %s classes: their accuracy and AUSUC are not defined (nan)", name)
    return curve


def ausuc(
    logits: Any,
    labels: Any,
    seen: Any,
    absent: Any = None,
    *,
    classes: Sequence[str] | None = None,
    remaining: str = "absent",
) -> float:
    """Area under the seen-unseen curve, in [0, 1]; arguments as in `seen_unseen_curve`."""
    return seen_unseen_curve(logits, labels, seen, absent, classes=classes, remaining=remaining).ausuc


def _shape(logits: Any) -> tuple[int, int]:
    shape = tuple(logits.shape) if hasattr(logits, "shape") else np.shape(logits)
    if len(shape) != 2:
        raise UserError("scores must be a matrix, one row per sample and one column per class", given=f"shape {shape}")
    return int(shape[0]), int(shape[1])


def _best(
    block: NDArray[Any], fixed: Columns, moved: Columns, first_row: int
) -> tuple[Floats, NDArray[np.intp], NDArray[np.intp], int]:
    """Margins d (n,), best fixed and best moved column of each row (-1: the group has no score), and NaN scores."""
    top_fixed, best_fixed, nan_fixed = _top(block, fixed)
    top_moved, best_moved, nan_moved = _top(block, moved)
    infinite = np.isposinf(top_fixed) | np.isposinf(top_moved)
    if infinite.any():
        row = first_row + int(np.argmax(infinite))
        raise UserError("a score is infinite", where=f"row {row}", remedy="give finite scores, or -inf to mask a class")
    with np.errstate(invalid="ignore"):  # -inf - -inf: no score at all, NaN
        return top_fixed - top_moved, best_fixed, best_moved, nan_fixed + nan_moved


def _top(block: NDArray[Any], columns: Columns) -> tuple[Floats, NDArray[np.intp], int]:
    n, k = len(block), len(columns)
    if k == 0:
        return np.full(n, -np.inf), np.full(n, -1, dtype=np.intp), 0
    part, missing = take_columns(block, columns), 0
    place = part.argmax(axis=1)
    top = part[np.arange(n), place].astype(np.float64)
    if np.isnan(top).any():  # argmax stops at NaN
        missing = int(np.isnan(part).sum())
        part = np.where(np.isnan(part), -np.inf, part)
        place = part.argmax(axis=1)
        top = part[np.arange(n), place].astype(np.float64)
    return top, np.where(top > -np.inf, columns[place], -1), missing


def _representatives(breaks: Floats) -> Floats:
    """One gamma inside every interval between the breaks."""
    if len(breaks) == 0:
        return np.zeros(1)
    inner = breaks[:-1] + np.diff(breaks) / 2
    low = min(breaks[0] - 1, np.nextafter(breaks[0], -np.inf))  # the second where 1 is below the precision
    high = max(breaks[-1] + 1, np.nextafter(breaks[-1], np.inf))
    return np.concatenate([[low], inner, [high]])

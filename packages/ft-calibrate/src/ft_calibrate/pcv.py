"""PCV, pseudo cross-validation: gamma from pseudo models that lack a part of the seen classes.

FTC (arXiv 2409.16223), calibration by pseudo cross-validation. For every fold r, S is split into pseudo-seen classes
S'_r and pseudo-absent classes U'_r = S - S'_r; the source model is fine-tuned on samples of S'_r with the recipe of the
real run; gamma_r maximises a criterion on held-out samples of S'_r and the (never trained on) samples of U'_r;
gamma_PCV = mean_r gamma_r. This file is the part on logits; the retraining is in ``ft_calibrate.pcv_run``.

The published code differs from the paper: it evaluates the pseudo models on labelled samples of the *true* absent
classes, takes its floor from the remaining classes, and can draw absent classes as pseudo-seen ones. None of this is
done here: a fold with a label outside S is refused.

A mistake seen in public re-implementations is to call a grid search over gamma on the training labels "PCV". Those
labels are all seen, so no gamma above 0 can ever win. So a fold without pseudo-absent samples is refused as well.

ratio-PCV is ours, not from the paper: pseudo models see fewer classes than the real one, which makes their gamma too
large, and the average logit gap (`ft_calibrate.gap`) shares that excess. So the folds only tell by which factor ALG has
to be multiplied: m = mean_r gamma_r / ALG_r, gamma = m * gamma_ALG(real model).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from vfm_core.errors import UserError

from ft_calibrate.curve import CRITERIA, Curve, FloorNotReached, seen_unseen_curve
from ft_calibrate.gap import GapAccumulator, GapUndefined
from ft_calibrate.groups import ClassGroups, class_groups, label_columns
from ft_calibrate.inputs import as_scores, looks_like_probabilities

__all__ = ["Fold", "GammaEstimate", "pseudo_cross_validation", "ratio_pcv"]

log = logging.getLogger(__name__)

Columns = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Fold:
    """Logits of one pseudo model.

    Parameters
    ----------
    logits
        (N, K) on held-out samples of S'_r and all samples of U'_r.
    labels
        (N,) class names or columns, all in S.
    pseudo_seen
        S'_r: names or columns of the classes that the pseudo model was trained on.
    train_logits, train_labels
        (n, K), (n,): its own training samples, labels in S'_r; needed by `ratio_pcv` only.
    absent
        U, the truly absent classes. By default every class outside ``seen`` of the call; when that is not given either,
        nothing: the columns are then all of S.
    floor
        Accuracy of the source model on U'_r, in [0, 1], for the criterion ``"source-floor"``; -1: leave the fold out.
    name
        For reports; by default the fold's number.
    """

    logits: Any
    labels: Any
    pseudo_seen: Any
    train_logits: Any = None
    train_labels: Any = None
    absent: Any = None
    floor: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class GammaEstimate:
    """A gamma with its spread over folds.

    Parameters
    ----------
    gamma : float
        The estimate, in logit units.
    method : str
        ``"pcv"`` (the paper's) or ``"ratio-pcv"`` (ours).
    criterion : str
        What every fold's gamma maximises.
    per_fold : tuple of float
        Gamma of every fold that counts.
    std : float
        Their standard deviation (n - 1); for ratio-PCV that of ``multipliers`` times ``gamma_alg``. NaN for one fold.
    ci95 : (float, float) or None
        t interval of the mean over folds; None for one fold or for the median. With three folds it is wide.
    columns : str
        ``"pseudo"`` or ``"all"``.
    multipliers : tuple of float
        gamma_r / ALG_r; ratio-PCV only.
    gamma_alg : float or None
        The average logit gap of the real model; ratio-PCV only.
    skipped : tuple of str
        Folds that do not count, each with the reason.
    """

    gamma: float
    method: str
    criterion: str
    per_fold: tuple[float, ...]
    std: float
    ci95: tuple[float, float] | None
    columns: str
    multipliers: tuple[float, ...] = ()
    gamma_alg: float | None = None
    skipped: tuple[str, ...] = ()

    @property
    def gammas(self) -> tuple[float, ...]:
        """What every fold that counts says of the gamma of the real model; for ratio-PCV multiplier x ALG."""
        if self.gamma_alg is None:
            return self.per_fold
        return tuple(ratio * self.gamma_alg for ratio in self.multipliers)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self)


def pseudo_cross_validation(
    folds: Iterable[Fold],
    criterion: str = "balanced",
    columns: str = "pseudo",
    reduce: str = "mean",
    classes: Sequence[str] | None = None,
    seen: Any = None,
) -> GammaEstimate:
    """gamma_PCV from the logits of pseudo models (FTC).

    Parameters
    ----------
    folds
        One `Fold` per pseudo model; three in the paper.
    criterion : {"balanced", "overall", "harmonic", "source-floor"}
        What every fold's gamma maximises; the midpoint of the best plateau is taken. ``"source-floor"`` is overall
        accuracy subject to Acc on U'_r >= the fold's ``floor``; a fold that cannot meet its floor is skipped and named.
    columns : {"pseudo", "all"}
        ``"pseudo"``: only columns of S compete, U'_r gets gamma. ``"all"``: U'_r and U get gamma.
    reduce : {"mean", "median"}
        Over the folds.
    classes
        Names of the K columns.
    seen
        S. By default everything that is not a fold's ``absent``.

    Returns
    -------
    GammaEstimate

    Raises
    ------
    UserError
        No fold (left), a fold with labels outside S (a leak) or without pseudo-absent samples, or bad options.
    """
    prepared = _prepare(folds, criterion, columns, reduce, classes, seen)
    per_fold, skipped = [], []
    for fold in prepared:
        gamma, reason = fold.gamma(criterion)
        if reason:
            skipped.append(_skip(fold, reason))
        else:
            per_fold.append(gamma)
    centre, std, ci95 = _summary(per_fold, reduce, skipped)
    return GammaEstimate(centre, "pcv", criterion, tuple(per_fold), std, ci95, columns, skipped=tuple(skipped))


def ratio_pcv(
    folds: Iterable[Fold],
    gamma_alg: float,
    criterion: str = "balanced",
    columns: str = "pseudo",
    reduce: str = "mean",
    classes: Sequence[str] | None = None,
    seen: Any = None,
) -> GammaEstimate:
    """Ratio-PCV: m * gamma_ALG with m = mean_r gamma_r / ALG_r (ours, not from the paper).

    Parameters
    ----------
    folds
        As in `pseudo_cross_validation`, with ``train_logits`` and ``train_labels``.
    gamma_alg
        `ft_calibrate.gap.average_logit_gap` of the real model on its fine-tuning data.
    criterion, columns, reduce, classes, seen
        As in `pseudo_cross_validation`.

    Returns
    -------
    GammaEstimate
        A fold whose ALG is not positive, or not defined (one pseudo-seen class), has no ratio: it is skipped and named.

    Raises
    ------
    UserError
        As in `pseudo_cross_validation`; a fold without training logits.
    """
    if not np.isfinite(gamma_alg):
        raise UserError("gamma_alg must be finite", given=gamma_alg)
    prepared = _prepare(folds, criterion, columns, reduce, classes, seen)
    per_fold, multipliers, skipped = [], [], []
    for fold in prepared:
        try:
            alg = fold.alg()
        except GapUndefined as error:
            skipped.append(_skip(fold, f"{error.what} ({error.given})"))
            continue
        gamma, reason = fold.gamma(criterion)
        if not reason and alg <= 0:
            reason = f"its average logit gap is {alg:.4g}, not positive"
        if reason:
            skipped.append(_skip(fold, reason))
            continue
        per_fold.append(gamma)
        multipliers.append(gamma / alg)
    m, std, ci95 = _summary(multipliers, reduce, skipped)
    ends = sorted(e * gamma_alg for e in ci95) if ci95 else None
    return GammaEstimate(
        gamma=m * gamma_alg,
        method="ratio-pcv",
        criterion=criterion,
        per_fold=tuple(per_fold),
        std=std * abs(gamma_alg),
        ci95=(ends[0], ends[1]) if ends else None,
        columns=columns,
        multipliers=tuple(multipliers),
        gamma_alg=float(gamma_alg),
        skipped=tuple(skipped),
    )


@dataclass(frozen=True, eq=False)
class _Prepared:
    """One checked fold: S' against the columns that get gamma; the other columns do not compete."""

    fold: Fold
    groups: ClassGroups
    logits: NDArray[Any]
    labels: NDArray[np.int64]
    name: str

    def curve(self) -> Curve:
        g = self.groups
        return seen_unseen_curve(self.logits, self.labels, g.seen, g.absent, classes=g.classes, remaining="exclude")

    def gamma(self, criterion: str) -> tuple[float, str]:
        """Gamma of the fold, and the reason to skip it (empty: none)."""
        curve = self.curve()
        if criterion != "source-floor":
            return curve.best(criterion).gamma, ""
        floor = self.fold.floor
        if floor is None:
            raise UserError(
                "source-floor needs the accuracy of the source model on the pseudo-absent classes",
                where=f"fold {self.name}",
                remedy="set Fold.floor, or choose another criterion",
            )
        if floor < 0:
            return np.nan, "marked to be left out (floor -1)"
        try:
            return curve.best(criterion, floor=floor).gamma, ""
        except FloorNotReached as error:
            return np.nan, str(error.what) + f" ({error.given})"

    def alg(self) -> float:
        fold, g = self.fold, self.groups
        if fold.train_logits is None or fold.train_labels is None:
            remedy = "set Fold.train_logits and Fold.train_labels"
            raise UserError(
                "ratio-PCV needs the pseudo model's training logits", where=f"fold {self.name}", remedy=remedy
            )
        if looks_like_probabilities(fold.train_logits):
            remedy = "give logits or log-probabilities"
            raise UserError(
                "the average logit gap is no gap of logits on probabilities", where=f"fold {self.name}", remedy=remedy
            )
        where = f"fold {self.name}, train_labels"
        y = label_columns(fold.train_labels, g.classes, where=where)
        outside = np.setdiff1d(y, np.append(g.seen, -1))
        if len(outside):
            given = ", ".join(g.names(outside)[:5])
            raise UserError("training labels that are not pseudo-seen", where=where, given=given)
        gap = GapAccumulator(g, remaining="exclude")
        gap.add(fold.train_logits, y, where=f"fold {self.name}, train_logits")
        return gap.gamma()


def _skip(fold: _Prepared, reason: str) -> str:
    log.warning("fold %s is skipped: %s", fold.name, reason)
    return f"{fold.name}: {reason}"


def _prepare(
    folds: Iterable[Fold], criterion: str, columns: str, reduce: str, classes: Sequence[str] | None, seen: Any
) -> list[_Prepared]:
    for what, given, known in (
        ("criterion", criterion, CRITERIA),
        ("columns", columns, ("pseudo", "all")),
        ("reduce", reduce, ("mean", "median")),
    ):
        if given not in known:
            raise UserError(f"unknown {what}", given=repr(given), remedy=f"use {', '.join(known)}")
    return [_checked(fold, fold.name or str(i), columns, classes, seen) for i, fold in enumerate(folds)]


def _checked(fold: Fold, name: str, columns: str, classes: Sequence[str] | None, seen: Any) -> _Prepared:
    where = f"fold {name}"
    z = as_scores(fold.logits, len(classes) if classes is not None else None, classes=classes, where=where)
    names = tuple(map(str, range(z.shape[1]) if classes is None else classes))
    s_prime = _columns(fold.pseudo_seen, names, where)
    s, u = _real_groups(fold, names, seen, where)
    outside = np.setdiff1d(s_prime, s)
    if len(outside):
        remedy = "pseudo-seen classes are drawn from the seen classes only"
        given = ", ".join(names[c] for c in outside[:5])
        raise UserError("pseudo-seen classes that are not seen", where=where, given=given, remedy=remedy)
    u_prime = np.setdiff1d(s, s_prime)
    if len(u_prime) == 0:
        raise UserError("no pseudo-absent class is left", where=where, remedy="leave some seen classes out of the fold")
    y = label_columns(fold.labels, names, rows=len(z), where=where)
    _check_labels(y, s, s_prime, u_prime, names, where)
    moved = u_prime if columns == "pseudo" else np.union1d(u_prime, u)
    return _Prepared(fold, class_groups(names, s_prime, moved, where=where), z, y, name)


def _columns(given: Any, names: Sequence[str], where: str) -> Columns:
    """Columns of a group; its absent counterpart is empty, so nothing is said about classes outside it."""
    return class_groups(names, given, [], where=where).seen


def _real_groups(fold: Fold, names: Sequence[str], seen: Any, where: str) -> tuple[Columns, Columns]:
    """Columns of S and U. The published code's use of labelled samples of U is refused by `_check_labels`."""
    everything = np.arange(len(names), dtype=np.intp)
    if seen is None and fold.absent is None:
        return everything, everything[:0]
    if fold.absent is None:
        s = _columns(seen, names, where)
        return s, np.setdiff1d(everything, s)
    if seen is None:
        u = _columns(fold.absent, names, where)
        return np.setdiff1d(everything, u), u
    groups = class_groups(names, seen, fold.absent, where=where)
    return groups.seen, groups.absent


def _check_labels(
    y: NDArray[np.int64], s: Columns, s_prime: Columns, u_prime: Columns, names: Sequence[str], where: str
) -> None:
    leaked = np.setdiff1d(y, np.append(s, -1))
    if len(leaked):
        raise UserError(
            "labels of absent classes in a pseudo-validation fold",
            where=where,
            given=", ".join(names[c] for c in leaked[:5]),
            remedy="pseudo cross-validation uses labels of seen classes only: drop these rows",
        )
    if not np.isin(y, u_prime).any():
        raise UserError(
            "no sample of a pseudo-absent class",
            where=where,
            given=f"{len(y)} labels, all pseudo-seen",
            remedy="add the samples of the left-out classes: on seen labels alone no gamma above 0 can ever win",
        )
    if not np.isin(y, s_prime).any():
        raise UserError(
            "no sample of a pseudo-seen class", where=where, remedy="add held-out samples of the pseudo-seen classes"
        )


def _summary(
    values: Sequence[float], reduce: str, skipped: Sequence[str]
) -> tuple[float, float, tuple[float, float] | None]:
    """Centre, standard deviation and, for a mean over two folds or more, its t interval."""
    n = len(values)
    if n == 0:
        raise UserError("no fold can be used", where="folds", given="; ".join(skipped) or "no folds")
    centre = float(np.mean(values) if reduce == "mean" else np.median(values))
    if n == 1:
        return centre, float("nan"), None
    std = float(np.std(values, ddof=1))
    if reduce == "median":
        return centre, std, None
    half = float(stats.t.ppf(0.975, n - 1)) * std / np.sqrt(n)
    return centre, std, (centre - half, centre + half)

"""The table of methods: what each needs, whether it is the paper's, and how it is solved.

FTC (arXiv 2409.16223) has three: ``alg`` (average logit gap), ``pcv`` (pseudo cross-validation) and the upper bound
``oracle`` (gamma*). The others are ours, or borrowed by us from neighbouring fields, and not from the paper. There is
no method "temperature": a temperature common to all logits cannot change an argmax.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.metrics import bootstrap_interval

from ft_calibrate import choices, repairs
from ft_calibrate.curve import margins
from ft_calibrate.gap import GapAccumulator
from ft_calibrate.groups import ClassGroups
from ft_calibrate.metrics import FEW
from ft_calibrate.pcv import Fold, GammaEstimate, pseudo_cross_validation, ratio_pcv

__all__ = ["METHODS", "Found", "Method", "Problem", "warn_without_rows"]

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
_BOOTSTRAP_ROWS = 20_000  # with more, a mean's normal interval is as good and costs nothing


@dataclass(frozen=True, eq=False)
class Problem:
    """What a method may use; the fields are the arguments of `ft_calibrate.calibration.fit_calibration`.

    ``z`` are the logits (N, K) and ``y`` the labels (N,) as columns (-1 unknown); the rest keep their names.
    """

    z: NDArray[Any] | None
    y: NDArray[np.int64] | None
    groups: ClassGroups
    remaining: str
    criterion: str | None = None
    gamma: float | None = None
    rate: float | None = None
    prior: Mapping[str, float] | Sequence[float] | None = None
    smoothing: float = 1.0
    head_weight: Any = None
    head_bias: Any = None
    bic_on: str = "absent"
    group_temperature: float | None = None
    folds: tuple[Fold, ...] | None = None
    columns: str = "pseudo"
    reduce: str = "mean"
    floor: float | None = None
    n_bootstrap: int = 1000
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found; the fields of the record of the same names."""

    gamma: float = 0.0
    criterion: str | None = None
    n_train: int = 0
    chosen_on: str = ""
    ci95: tuple[float, float] | None = None
    per_fold_gamma: tuple[float, ...] = ()
    scale: Floats | None = None
    shift: Floats | None = None
    uses_absent_labels: bool = False
    details: dict[str, Any] = field(default_factory=dict)


def _alg(p: Problem) -> Found:
    gap = GapAccumulator(p.groups, p.remaining)
    gap.add(p.z, p.y, checked=True)
    gamma = gap.gamma()
    _warn_tiny(gap.n, "labelled rows")
    return Found(
        gamma,
        n_train=gap.n,
        chosen_on=f"{gap.n} rows, {gap.n_absent} of them of classes that are not seen"
        if gap.n_absent
        else f"{gap.n} fine-tuning rows of seen classes",
        ci95=_mean_interval(gap.gaps, p.n_bootstrap, p.seed),
        uses_absent_labels=gap.n_absent > 0,
    )


def _mean_interval(values: Floats, n_bootstrap: int, seed: int) -> tuple[float, float] | None:
    n = len(values)
    if n < 2 or n_bootstrap == 0:
        return None
    if n > _BOOTSTRAP_ROWS:
        centre, half = values.mean(), 1.96 * values.std(ddof=1) / np.sqrt(n)
        return float(centre - half), float(centre + half)
    interval = bootstrap_interval(values, n=n_bootstrap, seed=seed)
    return interval.low, interval.high


def _pcv(p: Problem) -> Found:
    estimate = pseudo_cross_validation(_folds(p), *_fold_options(p))
    return _from_folds(p, estimate, 0)


def _ratio_pcv(p: Problem) -> Found:
    alg = _alg(p)
    estimate = ratio_pcv(_folds(p), alg.gamma, *_fold_options(p))
    found = _from_folds(p, estimate, alg.n_train)
    return Found(**{**vars(found), "uses_absent_labels": alg.uses_absent_labels})


def _folds(p: Problem) -> tuple[Fold, ...]:
    if not p.folds:
        remedy = "give the logits of pseudo models as folds, or let ft-calibrate pcv train them"
        raise UserError("pseudo cross-validation needs folds", where="folds", remedy=remedy)
    return p.folds


def _fold_options(p: Problem) -> tuple[Any, ...]:
    g = p.groups
    return p.criterion or "balanced", p.columns, p.reduce, g.classes, g.names(g.seen)


def _from_folds(p: Problem, estimate: GammaEstimate, extra_rows: int) -> Found:
    details = estimate.to_dict()
    rows = sum(len(fold.labels) for fold in _folds(p))
    return Found(
        estimate.gamma,
        estimate.criterion,
        rows + extra_rows,
        f"{len(estimate.per_fold)} pseudo models, {rows} held-out rows of seen classes"
        + (f", and the gap of {extra_rows} fine-tuning rows" if extra_rows else ""),
        estimate.ci95,
        estimate.per_fold,
        details={k: details[k] for k in ("std", "columns", "multipliers", "gamma_alg", "skipped")},
    )


def _val(p: Problem, method: str = "val", what: str = "held-out rows") -> Found:
    criterion = p.criterion or "overall"
    found = choices.val_gamma(
        p.z, p.y, p.groups, criterion, p.remaining, p.floor, p.n_bootstrap, p.seed, f"method {method}"
    )
    return Found(
        found.gamma,
        criterion,
        found.n_seen + found.n_absent,
        f"{what}: {found.n_seen} of seen and {found.n_absent} of absent classes, labelled",
        found.ci95,
        uses_absent_labels=True,
        details={"value": found.best.value, "plateau": (found.best.low, found.best.high)},
    )


def _oracle(p: Problem) -> Found:
    return _val(p, "oracle", "test rows (upper bound, not deployable)")


def _fixed(p: Problem) -> Found:
    if p.gamma is None or not np.isfinite(p.gamma):
        raise UserError("method fixed needs a finite gamma", where="gamma", given=p.gamma, remedy="give a number")
    return Found(float(p.gamma), chosen_on="no data: a given number")


def _rate(p: Problem) -> Found:
    if p.rate is None:
        remedy = "give the expected share of absent samples, in [0, 1]"
        raise UserError("method rate needs a rate", where="rate", remedy=remedy)
    gamma = choices.rate_gamma(p.z, p.rate, p.groups, p.remaining)
    d = margins(p.z, p.groups, p.remaining)
    half = 1.96 * np.sqrt(p.rate * (1 - p.rate) / len(d))  # binomial interval of the quantile
    low, high = np.quantile(d, np.clip([p.rate - half, p.rate + half], 0, 1))
    return Found(
        gamma,
        n_train=len(d),
        chosen_on=f"{len(d)} unlabelled rows and an expected share of {p.rate:g} of absent samples",
        ci95=(min(float(low), gamma), max(float(high), gamma)),
        details={"rate": p.rate},
    )


def _prior(p: Problem) -> Found:
    y = np.empty(0, np.int64) if p.y is None else p.y[p.y >= 0]
    shift = repairs.prior_shift(y, p.groups, p.prior, p.smoothing)
    outside = bool(np.setdiff1d(y, p.groups.seen).size)
    chosen_on = f"the class shares of {len(y)} fine-tuning labels"
    return Found(n_train=len(y), chosen_on=chosen_on, shift=shift, uses_absent_labels=outside)


def _weight_align(p: Problem) -> Found:
    if p.head_weight is None:
        remedy = "give the (K, D) weight of the head"
        raise UserError("method weight-align needs the head", where="head_weight", remedy=remedy)
    scale, shift = repairs.weight_align(p.head_weight, p.groups, p.remaining, p.head_bias)
    factor = float(scale[p.groups.moved(p.remaining)[0]])
    return Found(chosen_on="no data: the norms of the head's rows", scale=scale, shift=shift, details={"scale": factor})


def _bic(p: Problem) -> Found:
    criterion = p.criterion or "overall"
    found = repairs.bic(p.z, p.y, p.groups, p.bic_on, criterion, p.remaining)
    k = p.groups.num_classes
    scale, shift = np.ones(k), np.zeros(k)
    scale[found.columns] = found.alpha
    gamma = found.beta if p.bic_on == "absent" else 0.0
    if p.bic_on == "seen":
        shift[found.columns] = found.beta
    return Found(
        gamma,
        criterion,
        *_rows_of(p),
        scale=scale,
        shift=shift,
        uses_absent_labels=True,
        details={"alpha": found.alpha, "beta": found.beta, "on": p.bic_on},
    )


def _temperature_per_group(p: Problem) -> Found:
    criterion, (n, chosen_on) = None, (0, "no data: a given number")
    t = p.group_temperature
    if t is None:
        criterion, (n, chosen_on) = p.criterion or "overall", _rows_of(p)
        t = repairs.temperature_per_group(p.z, p.y, p.groups, criterion, p.remaining)
    elif not (np.isfinite(t) and t > 0):
        raise UserError("the temperature must be positive", where="group_temperature", given=t)
    scale = np.ones(p.groups.num_classes)
    scale[p.groups.moved(p.remaining)] = 1 / t
    fitted = criterion is not None
    return Found(
        0.0, criterion, n, chosen_on, scale=scale, uses_absent_labels=fitted, details={"temperature_absent": t}
    )


def _rows_of(p: Problem) -> tuple[int, str]:
    """Labelled rows of S and U, and a sentence on them."""
    seen, absent = (0 if p.y is None else int(np.isin(p.y, c).sum()) for c in (p.groups.seen, p.groups.absent))
    return seen + absent, f"held-out rows: {seen} of seen and {absent} of absent classes, labelled"


def warn_without_rows(groups: ClassGroups, present: Any) -> None:
    """Name the seen classes without a row among the labels ``present`` (columns): they count as seen all the same."""
    missing = groups.names(np.setdiff1d(groups.seen, present))
    if missing:
        named = ", ".join(missing[:8]) + (f", ... ({len(missing)} in all)" if len(missing) > 8 else "")
        log.warning("no row of the seen classes %s: are they absent?", named)


def _warn_tiny(n: int, what: str) -> None:
    if n < FEW:
        log.warning("only %d %s: look at the interval of gamma", n, what)


class Method(NamedTuple):
    """One row of `METHODS`.

    Parameters
    ----------
    source : {"paper", "ours"}
        ``"paper"``: FTC. ``"ours"``: not from the paper.
    needs : str
        What must be given.
    summary : str
        What it does, in one line.
    solve : callable
        From a `Problem` to what is `Found`.
    reads : str
        ``"logits"``, ``"labels"``, both or none of them, separated by a space.
    seen_labels_only : bool
        Whether a label outside S is a leak.
    """

    source: str
    needs: str
    summary: str
    solve: Callable[[Problem], Found]
    reads: str = ""
    seen_labels_only: bool = False


_BOTH = "logits labels"
_LABELLED = "logits and labels of seen and absent classes"

METHODS: dict[str, Method] = {
    "alg": Method(
        "paper", "fine-tuning logits and labels", "average gap of wrong seen to absent logits", _alg, _BOTH, True
    ),
    "pcv": Method("paper", "folds", "pseudo cross-validation: mean of the pseudo models' best gammas", _pcv),
    "ratio-pcv": Method(
        "ours",
        "folds, and fine-tuning logits and labels",
        "alg times the mean ratio of best gamma to alg over the folds",
        _ratio_pcv,
        _BOTH,
        True,
    ),
    "oracle": Method("paper", _LABELLED, "gamma*: best on test labels; upper bound, not deployable", _oracle, _BOTH),
    "fixed": Method("ours", "gamma", "a given number", _fixed),
    "val": Method("ours", _LABELLED + " (a few)", "best gamma on held-out labels of all classes", _val, _BOTH),
    "rate": Method(
        "ours", "unlabelled target logits, and rate", "predict the expected share of absent samples", _rate, "logits"
    ),
    "prior": Method("ours", "fine-tuning labels", "logit adjustment by class shares", _prior, "labels", True),
    "weight-align": Method("ours", "head_weight", "scale absent head rows to the norm of seen ones", _weight_align),
    "bic": Method("ours", _LABELLED, "alpha z + beta on one group, by cross-entropy", _bic, _BOTH),
    "temperature-per-group": Method(
        "ours", _LABELLED + ", or group_temperature", "z_U / T_U, by cross-entropy", _temperature_per_group, _BOTH
    ),
}

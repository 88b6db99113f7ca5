"""One cell of a comparison: a recipe's logits with one calibration, and what the two achieve.

The calibrations are those of FTC (none, ALG, PCV, gamma*) and ours; every cell says which data chose gamma and whether
labels of absent classes had a part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from vfm_core.errors import UserError, unknown_name
from vfm_core.metrics import expected_calibration_error

from ft_calibrate.curve import seen_unseen_curve
from ft_calibrate.groups import ClassGroups
from ft_calibrate.metrics import accuracy_decomposition
from ft_calibrate.pcv import Fold

if TYPE_CHECKING:
    from ft_calibrate.record import Calibration
    from ft_calibrate.tables import LogitTable

__all__ = ["CALIBRATIONS", "Material", "Measured", "check_calibration", "measure"]

CALIBRATIONS: dict[str, tuple[str, str]] = {
    "none": ("gamma = 0", "-"),
    "alg": ("average logit gap", "training data of S"),
    "pcv": ("pseudo cross-validation", "pseudo splits of the training data of S"),
    "ratio-pcv": ("ALG times the ratio that pseudo splits find (ours)", "pseudo splits and training data of S"),
    "oracle": ("gamma*, an upper bound that cannot be deployed", "labelled test data of all classes"),
    "fixed": ("fixed:G, a given gamma (ours)", "the user"),
    "rate": ("rate:P, from the expected share of absent samples (ours)", "unlabelled test data and a given share"),
    "prior": ("logit adjustment by the class frequencies (ours)", "class counts of the training data of S"),
    "weight-align": ("scale the absent rows of the head (ours)", "the head's weights"),
    "val": ("labelled training samples of all classes (ours)", "labelled training data of all classes"),
    "bic": ("bias correction with labels of U (ours)", "labelled training data of all classes"),
    "temperature-per-group": ("one temperature on U (ours)", "labelled training data of all classes"),
}
"""Calibrations of a comparison: what they do, and which data chose gamma."""

WITH_NUMBER = {"fixed": "gamma", "rate": "rate"}
NEEDS_FOLDS = ("pcv", "ratio-pcv")
LABELLED_ABSENT = ("val", "bic", "temperature-per-group")
_CURVE_POINTS = 400


def check_calibration(text: str) -> tuple[str, float | None]:
    """Split ``name`` or ``name:number``.

    Raises
    ------
    UserError
        An unknown name; a number that is missing or not wanted.
    """
    name, colon, number = text.partition(":")
    if name not in CALIBRATIONS:
        raise unknown_name("calibration", name, CALIBRATIONS, where="--calibrations")
    if bool(colon) != (name in WITH_NUMBER):
        remedy = f"write {name}:0.5" if name in WITH_NUMBER else f"write {name}"
        raise UserError(
            "calibration takes " + ("a" if name in WITH_NUMBER else "no") + " number", given=text, remedy=remedy
        )
    if not colon:
        return name, None
    try:
        return name, float(number)
    except ValueError:
        raise UserError("not a number", where="--calibrations", given=text, remedy=f"write {name}:0.5") from None


@dataclass(frozen=True, eq=False)
class Material:
    """What a cell is computed from.

    Attributes
    ----------
    train, test : LogitTable
        Of one recipe, on all training rows and on the test data.
    groups : ClassGroups
        S, U and R.
    head : mapping
        ``weight`` and ``bias`` of a linear head; empty for others.
    folds : sequence of Fold
        Pseudo models; empty unless the calibration needs them.
    criterion : str
        Of pseudo cross-validation.
    remaining : str
        What R does.
    """

    train: LogitTable
    test: LogitTable
    groups: ClassGroups
    head: Mapping[str, Any] = field(default_factory=dict)
    folds: Sequence[Fold] = ()
    criterion: str = "balanced"
    remaining: str = "absent"


@dataclass(frozen=True, eq=False)
class Measured:
    """A finished cell.

    Attributes
    ----------
    record : dict
        Accuracies (micro, and macro under ``"macro"``), AUSUC, ECE, gamma (None for a repair that also scales or
        shifts logits), ``effect`` in words, which data chose it, and ``skipped``: the
        folds of pseudo cross-validation that do not count, with the reasons.
    arrays : dict of str to ndarray
        ``predicted`` and ``labels`` (N,): columns, -1 where the label is unknown or masked out; ``curve`` (M, 2): seen
        and absent accuracy along the seen-unseen curve, thinned to at most 400 points.
    """

    record: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def measure(material: Material, calibration: str) -> Measured:
    """Calibrate and score.

    Raises
    ------
    UserError
        The calibration cannot be fitted on these data.
    """
    name, number = check_calibration(calibration)
    found = _fit(material, name, number)
    test, groups, remaining = material.test, material.groups, material.remaining
    labels = np.asarray(test.labels, dtype=np.int64)
    logits = np.asarray(test.logits)
    scores = _masked(logits, groups, remaining) if found is None else np.asarray(found.apply(logits, test.classes))
    names: dict[str, Any] = {"seen": groups.seen, "absent": groups.absent, "classes": groups.classes}
    micro = accuracy_decomposition(scores, labels, remaining=remaining, **names)
    macro = accuracy_decomposition(scores, labels, remaining=remaining, average="macro", topk=(1,), **names)
    record: dict[str, Any] = dict(micro)
    record["macro"] = {key: value for key, value in macro.items() if not key.startswith("n_")}
    curve = seen_unseen_curve(scores, labels, remaining=remaining, **names)
    record["AUSUC"] = curve.ausuc
    record["ECE"] = _ece(scores, labels, found)
    record |= {
        "gamma": _gamma(found),
        "effect": "" if found is None else found.effect(),
        "gamma_std": float(np.std(found.per_fold_gamma, ddof=1)) if found and len(found.per_fold_gamma) > 1 else None,
        "chosen_on": CALIBRATIONS[name][1],
        "absent_labels": bool(found and found.uses_absent_labels),
        "test_labels": bool(found and found.uses_test_labels),
        "oracle": bool(found and found.oracle),
        "skipped": list(found.details.get("skipped") or ()) if found else [],
    }
    points = np.stack([curve.seen, curve.unseen], axis=1)
    kept = np.unique(np.linspace(0, len(points) - 1, min(len(points), _CURVE_POINTS)).round().astype(np.intp))
    arrays = {
        "predicted": scores.argmax(axis=1).astype(np.int64),
        "labels": np.where(np.isin(labels, groups.excluded(remaining)), -1, labels),
        "curve": points[kept],
    }
    return Measured(record, arrays)


def _masked(logits: NDArray[Any], groups: ClassGroups, remaining: str) -> NDArray[Any]:
    excluded = groups.excluded(remaining)
    if len(excluded) == 0:
        return logits
    scores = logits.copy()
    scores[:, excluded] = -np.inf
    return scores


def _fit(material: Material, name: str, number: float | None) -> Calibration | None:
    from ft_calibrate.calibration import fit_calibration

    if name == "none":
        return None
    train, groups = material.train, material.groups
    labels = np.asarray(train.labels)
    options: dict[str, Any] = {"method": name, "remaining": material.remaining}
    if name in WITH_NUMBER:
        options[WITH_NUMBER[name]] = number
    if name in ("oracle", "rate"):
        rows, given = material.test.logits, material.test.labels if name == "oracle" else None
        return fit_calibration(rows, given, groups, **options, allow_absent_labels=name == "oracle")
    if name in LABELLED_ABSENT:
        wanted = np.flatnonzero(np.isin(labels, np.union1d(groups.seen, groups.absent)))
        if not np.isin(labels, groups.absent).any():
            remedy = "give training data of all classes, or leave this calibration out"
            raise UserError("no labelled sample of an absent class", where="--data", given=name, remedy=remedy)
        return fit_calibration(train.logits[wanted], labels[wanted], groups, **options, allow_absent_labels=True)
    if name == "weight-align":
        if "weight" not in material.head:
            remedy = "leave this calibration out for recipes whose head is not linear"
            raise UserError("no head weights to align", where="--calibrations", given=name, remedy=remedy)
        options |= {"head_weight": material.head["weight"], "head_bias": material.head.get("bias")}
    if name in NEEDS_FOLDS:
        options |= {"folds": list(material.folds), "criterion": material.criterion}
    own = np.flatnonzero(np.isin(labels, groups.seen))
    return fit_calibration(train.logits[own], labels[own], groups, **options)


def _ece(scores: NDArray[Any], labels: NDArray[np.int64], calibration: Calibration | None) -> float:
    """Expected calibration error of the softmax, 15 bins; masked columns have probability 0."""
    known = labels >= 0
    if not known.any():
        return float("nan")
    temperature = 1.0 if calibration is None else calibration.temperature
    shares = softmax(np.asarray(scores[known], dtype=np.float64) / temperature, axis=1)
    return expected_calibration_error(shares, labels[known])


def _gamma(calibration: Calibration | None) -> float | None:
    """Gamma where the calibration is one; None where it scales or shifts logits, so that gamma alone says nothing."""
    if calibration is None:
        return 0.0
    alone = calibration.scale is None and calibration.shift is None
    return float(calibration.gamma) if alone else None

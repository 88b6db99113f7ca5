"""One entry for every way to choose a calibration: `fit_calibration`, and the table `METHODS` of what there is.

FTC (arXiv 2409.16223) has three: ``alg`` (average logit gap), ``pcv`` (pseudo cross-validation) and the upper bound
``oracle`` (gamma*). The other methods are ours or borrowed by us and say so. Every result is a
`ft_calibrate.record.Calibration`, which says what data chose gamma.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError, unknown_name
from vfm_core.files import jsonable

from ft_calibrate.confidence import temperature_report
from ft_calibrate.groups import ClassGroups, label_columns
from ft_calibrate.inputs import looks_like_probabilities, to_logits
from ft_calibrate.methods import METHODS, Found, Method, Problem, warn_without_rows
from ft_calibrate.pcv import Fold
from ft_calibrate.record import Calibration, read_calibration

__all__ = ["METHODS", "Calibration", "Method", "fit_calibration", "read_calibration"]

log = logging.getLogger(__name__)


def fit_calibration(
    logits: Any,
    labels: Any,
    groups: ClassGroups,
    method: str = "alg",
    *,
    gamma: float | None = None,
    criterion: str | None = None,
    remaining: str = "absent",
    allow_absent_labels: bool = False,
    temperature: bool = False,
    held_out: tuple[Any, Any] | None = None,
    rate: float | None = None,
    prior: Mapping[str, float] | Sequence[float] | None = None,
    smoothing: float = 1.0,
    head_weight: Any = None,
    head_bias: Any = None,
    bic_on: str = "absent",
    group_temperature: float | None = None,
    folds: Iterable[Fold] | None = None,
    columns: str = "pseudo",
    reduce: str = "mean",
    floor: float | None = None,
    input: str = "logit",
    input_kind: str | None = None,
    input_sha256: str | None = None,
    uses_test_labels: bool | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Calibration:
    """Choose a calibration by any method of `METHODS`.

    Parameters
    ----------
    logits
        (N, K) scores of the data that the method needs; None for methods that need none.
    labels
        (N,) class names or columns, -1 or None where unknown; None for methods that need none.
    groups
        `ft_calibrate.groups.class_groups` of the K columns. With nothing absent gamma is 0.
    method
        A key of `METHODS`.
    gamma
        For ``"fixed"``.
    criterion
        For ``oracle``, ``val`` (default ``"overall"``), ``pcv``, ``ratio-pcv`` (default ``"balanced"``), ``bic`` and
        ``temperature-per-group`` (``"overall"`` or ``"balanced"``).
    remaining : {"absent", "keep", "exclude"}
        Whether the remaining classes get gamma, stay, or are masked out.
    allow_absent_labels
        Let ``alg``, ``ratio-pcv`` and ``prior`` use rows whose label is no seen class. Fine-tuning data have none, so
        this is a leak unless parity with the published code is wanted; the record then says ``uses_test_labels``.
    temperature
        Also fit one temperature after the bias, on held-out seen data (`ft_calibrate.confidence`).
    held_out
        Logits and labels for the temperature, of the same input kind; rows of other than seen classes are left out.
        Without it a fifth of the seen rows is set aside: the bias is fitted again without them, and the temperature
        on them. Gamma itself always uses all rows, so that a temperature never changes a prediction.
    rate
        Expected share of samples of moved classes, in [0, 1], for ``"rate"``.
    prior, smoothing
        Target class shares and added count for ``"prior"``.
    head_weight, head_bias
        (K, D) and (K,) of the linear head, for ``"weight-align"``.
    bic_on : {"absent", "seen"}
        The group that ``"bic"`` maps.
    group_temperature
        T_U of ``"temperature-per-group"`` when it is not to be fitted.
    folds, columns, reduce
        See `ft_calibrate.pcv.pseudo_cross_validation`.
    floor
        For the criterion ``"source-floor"`` of ``oracle`` and ``val``.
    input : {"logit", "logprob", "prob"}
        What ``logits`` are. Probabilities are logged here (floor 1e-30).
    input_kind
        Recorded instead of ``input`` when the conversion was done by the caller.
    input_sha256
        Hash of the input file; by default that of logits and labels.
    uses_test_labels
        Say that the labelled data are test data. By default true for ``oracle``, and where absent labels were allowed.
    n_bootstrap, seed
        Of the interval of gamma.

    Returns
    -------
    Calibration

    Raises
    ------
    UserError
        An unknown method or missing argument; labels outside S for a method that must not see them; probabilities
        given as logits to ``alg``; one seen class only for ``alg``; bad input.

    Examples
    --------
    >>> from ft_calibrate.groups import class_groups
    >>> fit_calibration([[5.0, 2.0, -1.0], [1.0, 6.0, -2.0]], [0, 1], class_groups(3, [0, 1])).gamma
    3.0
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS, where="method")
    groups.moved(remaining)  # refuses an unknown mode before any work
    reads = METHODS[method].reads if not (method == "temperature-per-group" and group_temperature) else ""
    z, zeros = (None, 0) if logits is None else _scores(logits, groups, method, input)
    rows = None if z is None else len(z)
    y = None if labels is None else label_columns(labels, groups.classes, rows=rows, where="labels")
    for name, values in (("logits", z), ("labels", y)):
        if values is None and name in reads:
            raise UserError(f"method {method} needs {name}", where=name, remedy=f"give {METHODS[method].needs}")
    leaked = METHODS[method].seen_labels_only and _leaked(y, groups, method, allow_absent_labels)
    if METHODS[method].seen_labels_only and y is not None and input_sha256 is None:  # else whoever read the file tells
        warn_without_rows(groups, y)
    problem = Problem(
        z, y, groups, remaining, criterion, gamma, rate, prior, smoothing, head_weight, head_bias, bic_on,
        group_temperature, _logged(folds, input), columns, reduce, floor, n_bootstrap, seed,
    )  # fmt: skip
    found = _solve(method, problem)
    notes = [f"{zeros} probabilities were exactly 0 and count as 1e-30"] if zeros else []
    if len(groups.moved(remaining)) == 0:
        notes.append("no class is absent, so gamma is 0")
    if leaked and uses_test_labels is None:
        notes.append("rows of classes that are not seen chose gamma: they count as test labels")
    record = Calibration(
        method=method,
        gamma=found.gamma,
        classes=groups.classes,
        seen=tuple(groups.names(groups.seen)),
        absent=tuple(groups.names(groups.absent)),
        remaining=tuple(groups.names(groups.remaining)),
        remaining_mode=remaining,
        criterion=found.criterion,
        n_train=found.n_train,
        chosen_on=found.chosen_on,
        per_fold_gamma=found.per_fold_gamma,
        ci95=found.ci95,
        uses_absent_labels=found.uses_absent_labels,
        uses_test_labels=bool(method == "oracle" or leaked) if uses_test_labels is None else uses_test_labels,
        oracle=method == "oracle",
        created_with=f"ft-calibrate {metadata.version('ft-calibrate')}",
        input_sha256=input_sha256 or _digest(z, y),
        input_kind=input_kind or input,
        scale=_tuple(found.scale),
        shift=_tuple(found.shift),
        details=jsonable(found.details),
        notes=tuple(notes),
    )
    return _with_temperature(record, problem, held_out, input) if temperature else record


def _scores(logits: Any, groups: ClassGroups, method: str, kind: str) -> tuple[NDArray[Any], int]:
    """Checked scores on the log scale; undeclared probabilities are refused by the methods that need logs."""
    z, zeros = to_logits(logits, kind, classes=groups.classes)
    if z.shape[1] != groups.num_classes:
        given = f"{z.shape[1]} columns for {groups.num_classes} classes"
        raise UserError("the number of columns differs from the number of classes", where="logits", given=given)
    if kind == "logit" and looks_like_probabilities(z):
        if method in ("alg", "ratio-pcv"):
            remedy = "say that they are probabilities (input='prob', --input prob)"
            raise UserError("the average logit gap is no gap of logits on probabilities", where="logits", remedy=remedy)
        log.warning("the rows look like probabilities (they sum to 1): say input='prob' (--input prob) if they are")
    return z, zeros


def _logged(folds: Iterable[Fold] | None, kind: str) -> tuple[Fold, ...] | None:
    """The folds with their scores on the log scale, like the main ones."""
    if folds is None or kind != "prob":
        return None if folds is None else tuple(folds)
    return tuple(
        replace(
            fold,
            logits=to_logits(fold.logits, kind)[0],
            train_logits=None if fold.train_logits is None else to_logits(fold.train_logits, kind)[0],
        )
        for fold in folds
    )


def _leaked(y: NDArray[np.int64] | None, groups: ClassGroups, method: str, allowed: bool) -> bool:
    """Whether labels lie outside S; an error unless that is allowed."""
    outside = np.setdiff1d([] if y is None else y, np.append(groups.seen, -1)).astype(np.intp)
    if len(outside) and not allowed:
        raise UserError(
            f"method {method} must not see labels of classes that are not seen",
            where="labels",
            given=", ".join(groups.names(outside)[:8]),
            remedy="give the fine-tuning data alone, name these classes as seen, or pass allow_absent_labels=True",
        )
    return bool(len(outside))


def _solve(method: str, problem: Problem) -> Found:
    if len(problem.groups.moved(problem.remaining)) == 0:
        if len(problem.groups.seen) < problem.groups.num_classes:  # else class_groups has said so
            log.warning("no class is absent: gamma is 0")
        return Found(chosen_on="no data: no class is absent")
    return METHODS[method].solve(problem)


def _with_temperature(
    record: Calibration, problem: Problem, held_out: tuple[Any, Any] | None, kind: str
) -> Calibration:
    """The record with a temperature fitted after the bias, on seen data that did not choose this bias."""
    groups = problem.groups
    if held_out is not None:
        z, _ = to_logits(held_out[0], kind, classes=groups.classes)
        y = label_columns(held_out[1], groups.classes, where="held_out labels")
        data, bias = "held-out data", record
    else:
        if problem.z is None or problem.y is None:
            remedy = "give held_out=(logits, labels)"
            raise UserError("a temperature needs held-out seen data", where="temperature", remedy=remedy)
        kept, aside = _set_aside(problem.y, groups, problem.seed)
        rest = _solve(record.method, replace(problem, z=problem.z[kept], y=problem.y[kept], n_bootstrap=0))
        bias = replace(record, gamma=rest.gamma, scale=_tuple(rest.scale), shift=_tuple(rest.shift))
        z, y, data = problem.z[aside], problem.y[aside], "a fifth of the seen rows, set aside"
    rows = np.isin(y, groups.seen)
    fit = temperature_report(bias.apply(z[rows]), y[rows], seed=problem.seed)
    confidence = {**fit.to_dict(), "data": f"{data} ({fit.n} rows)"}
    return replace(record, temperature=fit.temperature, confidence=confidence)


def _set_aside(
    y: NDArray[np.int64], groups: ClassGroups, seed: int, share: float = 0.2
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows that choose the bias, and a random share of the seen rows that does not."""
    seen = np.flatnonzero(np.isin(y, groups.seen))
    if len(seen) < 5:
        remedy = "give held_out=(logits, labels)"
        raise UserError("too few seen rows to set some aside for a temperature", given=len(seen), remedy=remedy)
    aside = np.random.default_rng(seed).permutation(seen)[: int(np.ceil(share * len(seen)))]
    return np.setdiff1d(np.arange(len(y)), aside), np.sort(aside)


def _tuple(values: NDArray[np.float64] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values.tolist())


def _digest(z: NDArray[Any] | None, y: NDArray[np.int64] | None) -> str | None:
    if z is None and y is None:
        return None
    digest = hashlib.sha256()
    for values in (z, y):
        if values is not None:
            digest.update(f"{values.dtype}{values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()

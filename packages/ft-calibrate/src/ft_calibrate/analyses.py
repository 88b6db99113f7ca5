"""Analyses of FTC on logits: accuracies (A1, A2), logit scale (A3) and the margin among absent classes (A5).

FTC = "Fine-Tuning is Fine, if Calibrated" (arXiv 2409.16223), section on why fine-tuning hurts absent classes: the
logits of the seen classes grow against those of the absent ones, while the absent classes keep their order: the true
one stays ahead of the others. Head weights (A4, A6) are in `analyses_head`, features (A7) in `analyses_features`.
Paired bootstrap standard errors are ours.

Every function takes arrays, lists or tensors and returns plain floats, so that it can be called each epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.metrics import as_array

from ft_calibrate.groups import ClassGroups

Floats = NDArray[np.float64]

_DISTINCT = 256  # distinct values up to which pairs are resampled; beyond, their mean is normal
_ROWS = 8192  # rows of logits copied at once: 64 MB of float64 at 1000 classes


class Change(NamedTuple):
    """A paired mean difference with its bootstrap standard error, 95 % interval and number of pairs."""

    change: float
    se: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> tuple[float, float, float]:
        """``(change, low, high)``, as tables show it."""
        return self.change, self.low, self.high


def paired_change(after: Any, before: Any, n_bootstrap: int = 1000, seed: int = 0) -> Change:
    """Mean of ``after - before`` over pairs and its bootstrap standard error.

    Resampling pairs with replacement draws the counts of the distinct differences from a multinomial distribution, so
    the cost does not grow with the number of samples: right or wrong before and after gives three distinct values.

    Parameters
    ----------
    after, before
        (N,) values of the same samples, such as 1 for right and 0 for wrong. Pairs with a NaN are left out: passing
        values that are NaN outside a group stratifies the resampling to that group's own samples.
    n_bootstrap
        Number of paired resamples, at least 2.
    seed
        Of the resampling.

    Returns
    -------
    Change
        All NaN with ``n = 0`` when no pair is left.

    Raises
    ------
    ValueError
        Vectors of different lengths, or fewer than 2 resamples.

    Examples
    --------
    >>> paired_change([1, 1, 0, 0], [1, 1, 0, 0]).se
    0.0
    """
    x, y = as_array(after).astype(np.float64), as_array(before).astype(np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"paired values must be vectors of one length, got {x.shape} and {y.shape}")
    if n_bootstrap < 2:
        raise ValueError(f"n_bootstrap must be at least 2, got {n_bootstrap}")
    difference = x - y
    difference = difference[~np.isnan(difference)]
    n = len(difference)
    if n == 0:
        return Change(np.nan, np.nan, np.nan, np.nan, 0)
    values, counts = np.unique(difference, return_counts=True)
    if len(values) > _DISTINCT:
        mean, se = float(difference.mean()), float(difference.std() / np.sqrt(n))
        return Change(mean, se, mean - 1.96 * se, mean + 1.96 * se, n)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=n_bootstrap) @ values / n
    low, high = np.quantile(draws, [0.025, 0.975])
    return Change(float(difference.mean()), float(draws.std(ddof=1)), float(low), float(high), n)


def mean_interval(values: Any, n_bootstrap: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``values`` (N,) without NaN, with its 95 % bootstrap interval: ``(mean, low, high)``."""
    kept = as_array(values).astype(np.float64)
    return paired_change(kept, np.zeros_like(kept), n_bootstrap, seed).interval


# ------------------------------------------------------------------------------------------------ A1, A2: accuracies


def accuracy_gain(
    nn: tuple[Mapping[str, Floats], Mapping[str, Floats]],
    ncm: tuple[Mapping[str, Floats], Mapping[str, Floats]] | None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A1: accuracy of seen and absent samples before and after fine-tuning, with the head and with class means.

    Parameters
    ----------
    nn, ncm
        ``(before, after)``, each the result of `ft_calibrate.metrics.correct_per_sample` (keys ``"S/Y"``, ``"U/Y"``),
        for the model's own head ("NN") and for the nearest class mean ("NCM"); None leaves NCM out.
    n_bootstrap, seed
        As in `paired_change`.

    Returns
    -------
    list of dict
        Rows ``classifier, group, before, after, change``; the last three are ``(value, low, high)``.
    """
    rows = []
    for name, pair in (("NN", nn), ("NCM", ncm)):
        if pair is None:
            continue
        for group in ("S", "U"):
            before, after = pair[0][f"{group}/Y"], pair[1][f"{group}/Y"]
            rows.append(
                {
                    "classifier": name,
                    "group": group,
                    "before": mean_interval(before, n_bootstrap, seed),
                    "after": mean_interval(after, n_bootstrap, seed),
                    "change": paired_change(after, before, n_bootstrap, seed).interval,
                }
            )
    return rows


def group_decision(margin: Any, labels: Any, groups: ClassGroups, gamma: float = 0.0) -> dict[str, float]:
    """A2: how well the model tells absent-class samples from seen-class ones, whatever the class, at a given gamma.

    A sample is called absent iff ``gamma > d`` with the margin ``d = max over S - max over U`` of its logits.

    Parameters
    ----------
    margin
        (N,) from `ft_calibrate.curve.margins`.
    labels
        (N,) columns; samples of neither group (-1 or remaining classes) are left out.
    gamma
        Scalar added to the absent logits.

    Returns
    -------
    dict
        ``accuracy``, ``balanced`` (mean of the next two), ``seen_kept``, ``absent_found``, in [0, 1]; NaN for an empty
        group.
    """
    d, y = as_array(margin).astype(np.float64), as_array(labels)
    called_absent = gamma > d
    seen, absent = np.isin(y, groups.seen), np.isin(y, groups.absent)
    kept, found = (~called_absent)[seen], called_absent[absent]
    right = np.concatenate([kept, found])
    seen_kept, absent_found = _mean(kept), _mean(found)
    return {
        "accuracy": _mean(right),
        "balanced": (seen_kept + absent_found) / 2,
        "seen_kept": seen_kept,
        "absent_found": absent_found,
    }


# ------------------------------------------------------------------------------------------------ A3: logit scale

LOGIT_SCALE = ("non_gt_S", "non_gt_U", "max_S", "max_U", "softmax_S")


def logit_scale_per_sample(
    logits: Any, labels: Any, groups: ClassGroups, remaining: str = "absent"
) -> dict[str, Floats]:
    """A3 for each sample: its non-ground-truth logits, its largest logits, and its softmax mass on S.

    Parameters
    ----------
    logits
        (N, K). Columns that are -inf for every sample are masked classes and left out.
    labels
        (N,) columns, -1 where unknown (then no logit is dropped as the ground truth).
    groups
        S and U; "U" below are the columns that gamma moves: U, and R unless ``remaining`` says otherwise.
    remaining
        See `ClassGroups.moved`; with "keep" the columns of R take part in the softmax only.

    Returns
    -------
    dict
        (N,) each: ``non_gt_S = mean_{c in S, c != y} z_c``, ``non_gt_U``, ``max_S``, ``max_U`` (in logit units) and
        ``softmax_S = sum_{c in S} softmax(z)_c`` in [0, 1]. NaN where no such column exists.
    """
    z, y = _logits_and_labels(logits, labels, groups)
    used = np.zeros(z.shape[1], bool)
    used[groups.columns(remaining)] = True
    masked = used & _all_masked(z)
    used &= ~masked
    seen = groups.seen[used[groups.seen]]
    moved = groups.moved(remaining)
    moved = moved[used[moved]]
    every = np.flatnonzero(used)
    out = {name: np.full(len(z), np.nan) for name in LOGIT_SCALE}
    for start, block in _blocks(z):
        rows = slice(start, start + len(block))
        for name, columns in (("S", seen), ("U", moved)):
            if not len(columns):
                continue
            part = block[:, columns]
            is_truth = columns == y[rows, None]
            others = len(columns) - is_truth.sum(1)
            total = np.where(is_truth, 0.0, part).sum(1)
            out[f"non_gt_{name}"][rows] = np.divide(total, others, out=np.full(len(part), np.nan), where=others > 0)
            out[f"max_{name}"][rows] = part.max(1)
        if len(seen) and len(every):
            e = np.exp(block[:, every] - block[:, every].max(1, keepdims=True))
            out["softmax_S"][rows] = e[:, np.isin(every, seen)].sum(1) / e.sum(1)
    return out


def logit_scale(
    logits: Any, labels: Any, groups: ClassGroups, remaining: str = "absent", rows: str = "all"
) -> dict[str, float]:
    """A3: means of `logit_scale_per_sample` over ``rows``: ``"all"``, ``"S"`` or ``"U"`` samples."""
    per_sample = logit_scale_per_sample(logits, labels, groups, remaining)
    chosen = rows_of(labels, groups)[rows]
    return {name: _mean(values[chosen]) for name, values in per_sample.items()}


# ------------------------------------------------------------------------------------------------ A5: margin inside U


def ground_truth_margin(logits: Any, labels: Any, groups: ClassGroups, remaining: str = "absent") -> dict[str, float]:
    """A5: does the true class stay ahead of the other absent ones? Over the samples of U.

    Returns
    -------
    dict
        ``true`` (mean logit of the true class), ``largest_other`` (mean of the largest other absent logit) and
        ``margin``, their difference, in logit units; NaN without a sample of U or with a single absent class.
    """
    per_sample = ground_truth_margin_per_sample(logits, labels, groups, remaining)
    true, other = per_sample
    return {"true": _mean(true), "largest_other": _mean(other), "margin": _mean(true - other)}


def ground_truth_margin_per_sample(
    logits: Any, labels: Any, groups: ClassGroups, remaining: str = "absent"
) -> tuple[Floats, Floats]:
    """True-class logit and largest other absent logit of each sample, (N,) each, NaN outside U."""
    z, y = _logits_and_labels(logits, labels, groups)
    columns = groups.moved(remaining)
    rows = np.flatnonzero(np.isin(y, groups.absent))
    true, other = np.full(len(z), np.nan), np.full(len(z), np.nan)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        block = np.asarray(z[part][:, columns], np.float64)
        is_truth = columns == y[part, None]
        true[part] = block[is_truth]
        if len(columns) > 1:
            other[part] = np.where(is_truth, -np.inf, block).max(1)
    other[np.isneginf(other)] = np.nan
    true[np.isneginf(true)] = np.nan
    return true, other


# ------------------------------------------------------------------------------------------------ parts


def rows_of(labels: Any, groups: ClassGroups) -> dict[str, NDArray[np.bool_]]:
    """Masks (N,) of the samples of ``"S"``, ``"U"`` and ``"all"`` (every one)."""
    y = as_array(labels)
    return {"all": np.ones(len(y), bool), "S": np.isin(y, groups.seen), "U": np.isin(y, groups.absent)}


def _mean(values: Any) -> float:
    kept = np.asarray(values, np.float64)
    kept = kept[~np.isnan(kept)]
    return float(kept.mean()) if len(kept) else float("nan")


def _logits_and_labels(logits: Any, labels: Any, groups: ClassGroups) -> tuple[NDArray[Any], NDArray[Any]]:
    z, y = as_array(logits), as_array(labels)
    if z.ndim != 2 or y.shape != z.shape[:1] or z.shape[1] != groups.num_classes:
        given = f"logits {z.shape}, labels {y.shape}, {groups.num_classes} classes"
        raise UserError("logits, labels and classes do not fit", given=given, remedy="give (N, K), (N,) and K classes")
    return z, y


def _blocks(z: NDArray[Any]) -> Iterator[tuple[int, Floats]]:
    """Rows in float64, block by block: a memory-mapped file is never read whole."""
    for start in range(0, len(z), _ROWS):
        yield start, np.asarray(z[start : start + _ROWS], np.float64)


def _all_masked(z: NDArray[Any]) -> NDArray[np.bool_]:
    masked = np.full(z.shape[1], len(z) > 0)
    for start in range(0, len(z), _ROWS):
        masked &= np.isneginf(np.asarray(z[start : start + _ROWS])).all(0)
        if not masked.any():
            break
    return masked

"""Accuracy by group: who is right, among which rivals.

FTC (arXiv 2409.16223): Acc_{A/B} is the share of the test samples with y in A whose argmax *restricted to columns B*
equals y. Reported are Acc_{Y/Y}, Acc_{S/Y}, Acc_{U/Y}, Acc_{S/S}, Acc_{U/U}, top-1 and top-5; the published code adds
R, the remaining classes, masks columns with -inf and reads NaN as -inf. Class-mean ("macro") accuracy, the harmonic
mean (from generalised zero-shot learning) and the intervals are ours.

Ties: the first of equal columns wins, as with `numpy.argmax`. A sample whose own score is -inf is never right.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.metrics import Interval, as_array, harmonic_mean

from ft_calibrate.groups import ClassGroups, Columns, class_groups, label_columns

__all__ = [
    "accuracy_decomposition",
    "as_groups",
    "correct_per_sample",
    "group_intervals",
    "harmonic_mean",
    "score_chunks",
    "take_columns",
    "warn_nan",
]

log = logging.getLogger(__name__)

FEW = 30  # samples per group below which a share, or a gamma chosen on them, is only a hint
_BLOCK = 1 << 20  # scores handled at once
_NEVER = np.iinfo(np.int64).max  # rank of a sample that no k makes right
_GROUP_NAMES = {"Y": "all", "S": "seen", "U": "absent", "R": "remaining"}

Tallies = dict[str, tuple[NDArray[np.float64], NDArray[np.intp]]]  # key -> right samples, samples; (K,) by class


def _host_scores(scores: Any) -> NDArray[Any]:
    """``scores`` as a float array (N, K) on the host: float32 and float64 as they are, anything else widened.

    Raises
    ------
    UserError
        If it is not a matrix of numbers.
    """
    if hasattr(scores, "detach"):
        scores = scores.detach().cpu()
        scores = scores.numpy() if str(scores.dtype) == "torch.float64" else as_array(scores)
    array = np.asarray(scores)
    if array.ndim != 2 or array.dtype.kind not in "fiub":
        raise UserError(
            "scores must be a matrix of numbers, one row per sample and one column per class",
            given=f"shape {array.shape}, {array.dtype}",
        )
    if array.dtype.kind != "f":
        return array.astype(np.float64)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def score_chunks(scores: Any, columns: int | None = None) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Blocks of rows of ``scores`` (N, K) as host arrays, so that temporaries stay small.

    Parameters
    ----------
    scores
        (N, K) array, memory map, list or tensor (moved block by block).
    columns
        How many columns the caller works on, for the size of a block; default K.

    Yields
    ------
    slice, ndarray
        The rows and their scores. Blocks are views where they can be; do not write to them.
    """
    whole = scores if hasattr(scores, "shape") else np.asarray(scores)
    if len(whole.shape) != 2:
        _host_scores(whole)  # raises, naming the shape
    rows = max(1, _BLOCK // max(1, columns or whole.shape[1]))
    for start in range(0, whole.shape[0], rows):
        part = slice(start, min(start + rows, whole.shape[0]))
        yield part, _host_scores(whole[part])


def warn_nan(count: int) -> None:
    """Tell that ``count`` scores are NaN, if any, since they count as -inf."""
    if count:
        log.warning("%d scores are NaN and count as -inf", count)


def take_columns(block: NDArray[Any], columns: Columns) -> NDArray[Any]:
    """Sorted ``columns`` of scores (n, K): a view where they are one run, else a copy (faster than by an index)."""
    k = len(columns)
    if k and columns[-1] - columns[0] + 1 == k:
        return block[:, columns[0] : columns[-1] + 1]
    return block.take(columns, axis=1)


def as_groups(width: int, seen: Any, absent: Any = None, classes: Sequence[str] | None = None) -> ClassGroups:
    """The groups of ``width`` columns: ``seen`` as they are when they are `ClassGroups` already, else made of them.

    Raises
    ------
    UserError
        If the number of classes is not the number of columns.
    """
    groups = (
        seen if isinstance(seen, ClassGroups) else class_groups(width if classes is None else classes, seen, absent)
    )
    if groups.num_classes != width:
        raise UserError(
            "there must be one class name per column", given=f"{groups.num_classes} classes, {width} columns"
        )
    return groups


def accuracy_decomposition(
    logits: Any,
    labels: Any,
    seen: Any,
    absent: Any = None,
    classes: Sequence[str] | None = None,
    topk: Sequence[int] = (1, 5),
    average: str = "micro",
    remaining: str = "absent",
) -> dict[str, float]:
    """Acc_{A/B} of every group A among all columns and among its own.

    Parameters
    ----------
    logits
        Scores (N, K), any monotone kind; NaN counts as -inf.
    labels
        (N,) class names or column numbers; unknown ones (-1, None, "") are left out.
    seen, absent
        The groups, as `class_groups` takes them, or one `ClassGroups` as ``seen``.
    classes
        Names of the K columns; default ``"0"`` .. ``"K-1"``.
    topk
        Right means: among the k best. k = 1 is always computed.
    average
        ``"micro"``: share of the samples (the paper). ``"macro"``: mean over the classes that have samples (ours).
    remaining
        Whether the columns R compete; with ``"exclude"`` they do not, and samples of R do not count in Y.
        Else they do count: ``"Y/Y"`` is over all samples, while ``overall`` of the curve
        (`ft_calibrate.curve_points.Curve`), by which gamma is chosen, is over those of S and U.

    Returns
    -------
    dict of str to float
        ``"Y/Y"``, ``"S/Y"``, ``"U/Y"``, ``"S/S"``, ``"U/U"`` in [0, 1] (``"R/Y"``, ``"R/R"`` too when there are
        remaining classes), the same with ``"@k"`` for k > 1; ``"H"``, the harmonic mean of S/Y and U/Y; and the numbers
        of samples ``"n_S"``, ``"n_U"``, ``"n_R"``. An empty group is NaN, and a warning names it.

    Raises
    ------
    UserError
        Wrong shapes, unknown classes or labels, or an unknown option.

    Examples
    --------
    >>> accuracy_decomposition([[2, 1, 0], [2, 1, 0]], [0, 1], seen=[0], topk=(1,))["U/Y"]
    0.0
    """
    groups, y, right = _right(logits, labels, seen, absent, classes, topk, remaining)
    result = averages(tallies(right, y, groups.num_classes), average)
    group_of = groups.group_of[y[y >= 0]]
    counts = {name: int((group_of == name).sum()) for name in "SUR"}
    for name in "SUR" if len(groups.remaining) and remaining != "exclude" else "SU":
        if counts[name] == 0:
            keys = ", ".join(key for key in right if key.startswith(name) and "@" not in key)
            log.warning("no sample of the %s classes: %s is not defined (nan)", _GROUP_NAMES[name], keys)
    return result | {f"n_{name}": float(counts[name]) for name in "SUR"}


def correct_per_sample(
    logits: Any,
    labels: Any,
    seen: Any,
    absent: Any = None,
    classes: Sequence[str] | None = None,
    topk: Sequence[int] = (1, 5),
    remaining: str = "absent",
) -> dict[str, NDArray[np.float64]]:
    """Whether each sample is right, for every key of `accuracy_decomposition`: material for paired differences.

    Returns
    -------
    dict of str to ndarray of float64
        (N,) each: 1 right, 0 wrong, NaN for samples outside the group. Arguments as in `accuracy_decomposition`.
    """
    return _right(logits, labels, seen, absent, classes, topk, remaining)[2]


def group_intervals(
    logits: Any,
    labels: Any,
    seen: Any,
    absent: Any = None,
    classes: Sequence[str] | None = None,
    topk: Sequence[int] = (1, 5),
    remaining: str = "absent",
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap interval of every micro accuracy of `accuracy_decomposition`, and of H.

    A warning names the groups with fewer than 30 samples. Right or wrong is 0 or 1, so the mean of a bootstrap sample
    of n values is exactly a binomial draw: the cost does not grow with the number of samples.

    Parameters
    ----------
    n
        Bootstrap samples.
    level
        Coverage, in (0, 1).
    seed
        Of the resampling. The others as in `accuracy_decomposition`.

    Returns
    -------
    dict of str to Interval
        (mean, low, high), NaN for an empty group.
    """
    groups, y, right = _right(logits, labels, seen, absent, classes, topk, remaining)
    result = tally_intervals(tallies(right, y, groups.num_classes), n, level, seed)
    group_of = groups.group_of[y[y >= 0]]
    for name in "SU":
        count = int((group_of == name).sum())
        if count < FEW:
            log.warning("only %d samples of the %s classes: read their intervals", count, _GROUP_NAMES[name])
    return result


def tallies(right: dict[str, NDArray[np.float64]], y: NDArray[np.int64], k: int) -> Tallies:
    """Right samples and samples of every class, for every key of `correct_per_sample`; ``y`` (N,) are the labels."""
    found: Tallies = {}
    for key, values in right.items():
        kept = ~np.isnan(values)
        right_of = np.bincount(y[kept], weights=values[kept], minlength=k).astype(np.float64)
        found[key] = right_of, np.bincount(y[kept], minlength=k)
    return found


def averages(counted: Tallies, average: str = "micro") -> dict[str, float]:
    """The accuracies of `accuracy_decomposition` and their harmonic mean from `tallies`."""
    if average not in ("micro", "macro"):
        raise UserError("unknown average", given=average, remedy="use micro or macro")
    found: dict[str, float] = {}
    for key, (right, count) in counted.items():
        if not count.any():
            found[key] = float("nan")
        elif average == "micro":
            found[key] = float(right.sum() / count.sum())
        else:
            found[key] = float((right[count > 0] / count[count > 0]).mean())
    return found | {"H": harmonic_mean(found["S/Y"], found["U/Y"])}


def tally_intervals(counted: Tallies, n: int = 2000, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
    """The intervals of `group_intervals` from `tallies`; arguments as there."""
    if not 0 < level < 1 or n < 1:
        raise UserError("intervals need a level in (0, 1) and at least 1 resample", given=f"level {level}, n {n}")
    tail = (1 - level) / 2
    means: dict[str, NDArray[np.float64]] = {}
    found: dict[str, Interval] = {}
    for i, (key, (right, count)) in enumerate(counted.items()):
        total = int(count.sum())
        if total == 0:
            found[key], means[key] = Interval(np.nan, np.nan, np.nan), np.full(n, np.nan)
            continue
        share = float(right.sum() / total)
        means[key] = np.random.default_rng([seed, i]).binomial(total, share, n) / total
        low, high = np.quantile(means[key], [tail, 1 - tail])
        found[key] = Interval(share, float(low), float(high))
    h = np.asarray(harmonic_mean(means["S/Y"], means["U/Y"]))
    low, high = (np.nan, np.nan) if np.isnan(h).all() else np.quantile(h, [tail, 1 - tail])
    found["H"] = Interval(harmonic_mean(found["S/Y"].mean, found["U/Y"].mean), float(low), float(high))
    return found


def _right(
    logits: Any,
    labels: Any,
    seen: Any,
    absent: Any,
    classes: Sequence[str] | None,
    topk: Sequence[int],
    remaining: str,
) -> tuple[ClassGroups, NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    ks = sorted({1, *map(int, topk)})
    if ks[0] < 1:
        raise UserError("top-k needs k of at least 1", given=list(topk))
    whole = logits if hasattr(logits, "shape") else _host_scores(logits)
    if len(whole.shape) != 2:
        _host_scores(whole)
    groups = as_groups(whole.shape[1], seen, absent, classes)
    y = label_columns(labels, groups.classes, rows=whole.shape[0])
    if (y < 0).any():
        log.warning("%d of %d samples have no label and are left out", int((y < 0).sum()), len(y))
    group_of = np.full(len(y), "", dtype="<U1")
    group_of[y >= 0] = groups.group_of[y[y >= 0]]
    competing = groups.columns(remaining)
    among_all, within = _ranks(whole, y, group_of, groups, competing)
    in_y = np.isin(y, competing)
    names = "SUR" if len(groups.remaining) else "SU"
    cases: list[tuple[str, NDArray[np.bool_], NDArray[np.int64]]] = [("Y/Y", in_y, among_all)]
    cases += [(f"{a}/Y", (group_of == a) & in_y, among_all) for a in names]
    cases += [(f"{a}/{a}", group_of == a, within) for a in names]
    found: dict[str, NDArray[np.float64]] = {}
    for k in ks:
        for key, rows, ranks in cases:
            found[key if k == 1 else f"{key}@{k}"] = np.where(rows, (ranks < k).astype(np.float64), np.nan)
    return groups, y, found


def _ranks(
    scores: Any, y: NDArray[np.int64], group_of: NDArray[np.str_], groups: ClassGroups, competing: Columns
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rank of the true class among the competing columns and within its own group, 0 = best; (N,) each."""
    among_all, within = np.full(len(y), _NEVER), np.full(len(y), _NEVER)
    own = {"S": groups.seen, "U": groups.absent, "R": groups.remaining}
    missing = 0
    for part, block in score_chunks(scores):
        if np.isnan(block.max(axis=1, initial=-np.inf)).any():
            missing += int(np.isnan(block).sum())
            block = np.where(np.isnan(block), -np.inf, block)
        among_all[part] = _rank(block, y[part], competing)
        for name, columns in own.items():
            rows = np.flatnonzero(group_of[part] == name)
            if len(rows):
                within[part.start + rows] = _rank(block[rows], y[part][rows], columns)
    warn_nan(missing)
    return among_all, within


def _rank(block: NDArray[Any], y: NDArray[np.int64], columns: Columns) -> NDArray[np.int64]:
    """How many of ``columns`` (sorted) beat column y: the larger ones, and the equal ones before it."""
    own = block[np.arange(len(y)), np.maximum(y, 0)]
    rivals = take_columns(block, columns)
    rank = np.count_nonzero(rivals > own[:, None], axis=1)
    equal = rivals == own[:, None]
    tied = np.flatnonzero(np.count_nonzero(equal, axis=1) > 1)
    rank[tied] += np.count_nonzero(equal[tied] & (columns < y[tied, None]), axis=1)
    rank[(y < 0) | ~(own > -np.inf) | ~np.isin(y, columns)] = _NEVER
    return rank

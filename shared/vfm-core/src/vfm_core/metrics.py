"""Metrics on arrays: what is right, how sure we are, and how two things compare.

Pure functions. Arrays, lists and tensors (any device) go in, plain floats or arrays come out. scikit-learn and scipy do
what they can; only what they lack is written here. Values that are NaN count as absent: they are left out of means and
intervals, never read as zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_BLOCK = 4_000_000  # resampled values held at once: 32 MB


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean paired difference, the ends of its interval and the p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float


def as_array(values: Any) -> NDArray[Any]:
    """``values`` as a numpy array; tensors come from any device and precision."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def _predictions_and_labels(predictions: Any, labels: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    y, t = as_array(predictions), as_array(labels)
    if y.ndim == 2:  # logits or probabilities
        y = y.argmax(axis=1)
    if y.shape != t.shape or t.ndim != 1:
        raise ValueError(f"predictions {y.shape} and labels {t.shape} must be vectors of one length")
    if len(t) == 0:
        raise ValueError("no labels")
    return y, t


def accuracy(predictions: Any, labels: Any) -> float:
    """Fraction of right predictions, in [0, 1].

    Parameters
    ----------
    predictions
        Class ids (N,), or scores (N, C) whose largest entry is the prediction.
    labels
        Class ids (N,).

    Raises
    ------
    ValueError
        If the shapes disagree or there is no label.
    """
    y, t = _predictions_and_labels(predictions, labels)
    return float((y == t).mean())


def per_class_accuracy(predictions: Any, labels: Any, num_classes: int | None = None) -> Floats:
    """Accuracy (recall) of each class, (C,) in [0, 1]; NaN for a class without a label.

    ``predictions`` and ``labels`` as in `accuracy`; C is ``num_classes``, or the width of the scores, or one more than
    the largest label.
    """
    width = as_array(predictions).shape[1] if as_array(predictions).ndim == 2 else None
    y, t = _predictions_and_labels(predictions, labels)
    classes = num_classes or width or int(t.max()) + 1
    if t.min() < 0 or t.max() >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {t.min()}..{t.max()}")
    count = np.bincount(t, minlength=classes)
    right = np.bincount(t[y == t], minlength=classes)
    return np.divide(right, count, out=np.full(classes, np.nan), where=count > 0)


def balanced_accuracy(predictions: Any, labels: Any) -> float:
    """Mean accuracy over the classes that have labels, in [0, 1]. Arguments as in `accuracy`."""
    return float(np.nanmean(per_class_accuracy(predictions, labels)))


def harmonic_mean(a: Any, b: Any) -> Any:
    """Harmonic mean 2ab / (a + b) of two accuracies; 0 where one of them is 0, NaN where one is NaN.

    Parameters
    ----------
    a, b
        Numbers or arrays >= 0 that broadcast against each other.

    Returns
    -------
    float or ndarray of float64
        A float when both are numbers.

    Raises
    ------
    ValueError
        If a value is negative.
    """
    x, y = as_array(a).astype(np.float64), as_array(b).astype(np.float64)
    if (x < 0).any() or (y < 0).any():
        raise ValueError("the harmonic mean needs values of at least 0")
    total = np.asarray(x + y)
    mean = np.divide(2 * x * y, total, out=np.zeros_like(total), where=total != 0)  # NaN != 0: it stays NaN
    return mean if mean.ndim else float(mean)


def expected_calibration_error(probabilities: Any, labels: Any, n_bins: int = 15, norm: str = "l1") -> float:
    """Gap between confidence and accuracy over equal bins of the confidence (torchmetrics).

    Parameters
    ----------
    probabilities
        (N, C), rows that sum to 1; the confidence is the largest entry.
    labels
        Class ids (N,).
    n_bins
        Number of bins of [0, 1].
    norm
        ``"l1"`` expected (ECE), ``"l2"`` root mean square, ``"max"`` largest gap.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If the shapes disagree, there is no label, or the rows are no probabilities.
    """
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    p, t = as_array(probabilities), as_array(labels)
    if p.ndim != 2 or t.shape != (len(p),) or len(t) == 0:
        raise ValueError(f"need probabilities (N, C) and labels (N,), got {p.shape} and {t.shape}")
    if not (p.min() >= 0 and np.allclose(p.sum(axis=1), 1, atol=1e-3)):
        raise ValueError("rows must be probabilities that sum to 1; apply a softmax to logits first")
    # torchmetrics would take a softmax of values outside [0, 1]; rounding must not push it there.
    scores = torch.from_numpy(np.clip(p, 0, 1).astype(np.float64))
    error = multiclass_calibration_error(
        scores,
        torch.from_numpy(t.astype(np.int64)),
        num_classes=max(2, p.shape[1]),
        n_bins=n_bins,
        norm=norm,  # type: ignore[arg-type]
    )
    return float(error)


def _resampled_means(values: Floats, n: int, seed: int) -> Floats:
    """Means of ``n`` bootstrap samples of ``values`` (N,), in blocks of bounded memory."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(values))
    blocks = [
        values[rng.integers(0, len(values), (min(rows, n - start), len(values)))].mean(axis=1)
        for start in range(0, n, rows)
    ]
    return np.concatenate(blocks)


def bootstrap_interval(values: Any, n: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean with its percentile bootstrap interval.

    Parameters
    ----------
    values
        (N,); NaN entries are left out.
    n
        Number of bootstrap samples.
    level
        Coverage, in (0, 1).
    seed
        Of the resampling; the same values give the same interval.

    Returns
    -------
    Interval
        ``(mean, low, high)``; all NaN when no value is left.
    """
    kept = _finite(values)
    _check_level(level)
    if len(kept) == 0:
        return Interval(np.nan, np.nan, np.nan)
    tail = (1 - level) / 2
    low, high = np.quantile(_resampled_means(kept, n, seed), [tail, 1 - tail])
    return Interval(float(kept.mean()), float(low), float(high))


def paired_difference(a: Any, b: Any, n: int = 2000, level: float = 0.95, seed: int = 0) -> Difference:
    """Mean of ``a - b`` over pairs, its bootstrap interval, and a two-sided sign-flip test of no difference.

    Under no difference every pair's sign is a fair coin. All 2^N sign patterns are tried when they are at most ``n``,
    otherwise ``n`` random ones, and then p = (1 + extreme) / (1 + n), which is never zero.

    Parameters
    ----------
    a, b
        (N,) each; pairs with a NaN are left out.
    n, level, seed
        As in `bootstrap_interval`.

    Returns
    -------
    Difference
        ``(difference, low, high, p)``; all NaN when no pair is left.
    """
    x, y = as_array(a).astype(np.float64), as_array(b).astype(np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"paired values must be vectors of one length, got {x.shape} and {y.shape}")
    d = _finite(x - y)
    if len(d) == 0:
        return Difference(np.nan, np.nan, np.nan, np.nan)
    mean, low, high = bootstrap_interval(d, n, level, seed)
    exact = 2.0 ** len(d) <= n
    if exact:
        patterns = np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1
        flipped = (1.0 - 2.0 * patterns) @ d / len(d)
    else:
        rng = np.random.default_rng([seed, 1])
        rows = max(1, _BLOCK // len(d))
        flipped = np.concatenate(
            [
                (1.0 - 2.0 * rng.integers(0, 2, (min(rows, n - start), len(d)))) @ d / len(d)
                for start in range(0, n, rows)
            ]
        )
    # The tolerance counts the observed pattern itself as extreme in spite of rounding.
    extreme = int((np.abs(flipped) >= abs(mean) * (1 - 1e-12)).sum())
    p = extreme / len(flipped) if exact else (1 + extreme) / (1 + len(flipped))
    return Difference(mean, low, high, p)


def wilson_interval(k: int, n: int, level: float = 0.95) -> Interval:
    """Proportion k/n with its Wilson score interval, all in [0, 1]; NaN when n = 0.

    Raises
    ------
    ValueError
        Unless 0 <= k <= n.
    """
    from scipy.stats import binomtest

    _check_level(level)
    if not 0 <= k <= n:
        raise ValueError(f"need 0 <= k <= n, got k = {k}, n = {n}")
    if n == 0:
        return Interval(np.nan, np.nan, np.nan)
    interval = binomtest(int(k), int(n)).proportion_ci(confidence_level=level, method="wilson")
    return Interval(k / n, float(interval.low), float(interval.high))


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's rank correlation of two vectors, in [-1, 1].

    Ties get their mean rank; pairs with a NaN are left out. NaN when a vector is constant or under two pairs are left.
    """
    from scipy.stats import rankdata

    x, y = as_array(a).astype(np.float64).ravel(), as_array(b).astype(np.float64).ravel()
    if x.shape != y.shape:
        raise ValueError(f"vectors must have one length, got {x.shape} and {y.shape}")
    kept = ~(np.isnan(x) | np.isnan(y))
    x, y = rankdata(x[kept]), rankdata(y[kept])
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))


def _finite(values: Any) -> Floats:
    kept = as_array(values).astype(np.float64)
    if kept.ndim != 1:
        raise ValueError(f"values must be a vector, got shape {kept.shape}")
    return kept[~np.isnan(kept)]


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")

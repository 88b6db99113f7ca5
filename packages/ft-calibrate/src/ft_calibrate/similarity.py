"""Similarity-based splits: seen and absent classes that lie far apart in feature space.

FTC (arXiv 2409.16223) compares random splits with splits by similarity (clusters of class means). How clusters become
groups of an exact size is not in its code that is public; what stands here is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from vfm_core.errors import UserError, unknown_name

from ft_calibrate.ncm import class_means

__all__ = ["class_centres", "group_similarity", "similar_classes"]


def class_centres(features: ArrayLike | None, labels: ArrayLike | None, classes: Sequence[str]) -> NDArray[np.float64]:
    """Return the direction of every class: the normalised mean of its normalised features.

    Parameters
    ----------
    features : array-like, (N, D), or (K, D) without labels
        Finite numbers. Torch tensors are welcome.
    labels : array-like of int, (N,), or None
        Column numbers; negative ones do not count.
    classes : sequence of str
        The K names.

    Returns
    -------
    ndarray of float64, (K, D)
        Rows of length one.

    Raises
    ------
    UserError
        Missing or not finite features, shapes that do not fit, a class without samples.
    """
    k = len(classes)
    if features is None:
        raise UserError("no features", where="split kind similarity", remedy="give a table with features and labels")
    f = np.asarray(features, dtype=np.float64)
    y = np.arange(len(f)) if labels is None else np.asarray(labels).reshape(-1)
    if f.ndim != 2 or len(y) != len(f) or (labels is None and len(f) != k):
        expected = f"({k}, D)" if labels is None else f"({len(y)}, D)"
        raise UserError("features of another shape", where="split kind similarity", given=f"{f.shape} for {expected}")
    if not np.isfinite(f).all():
        row = int(np.flatnonzero(~np.isfinite(f).all(axis=1))[0])
        raise UserError("features are not finite", where="split kind similarity", given=f"row {row}")
    if len(y) and y.max() >= k:
        raise UserError("label beyond the classes", where="split kind similarity", given=f"{y.max()} of {k}")
    y = np.maximum(y.astype(np.int64), -1)
    means: NDArray[np.float64] = class_means(f, y, k)
    empty = np.flatnonzero(np.isnan(means).any(axis=1))
    if len(empty):
        missing = [classes[int(c)] for c in empty]
        raise UserError(
            "classes without features",
            where="split kind similarity",
            given=", ".join(missing[:5]),
            remedy="extract features of all classes",
        )
    return means


def similar_classes(
    centres: NDArray[np.float64],
    n_seen: int,
    *,
    clustering: str = "agglomerative",
    clusters: int | None = None,
    seed: int = 0,
) -> NDArray[np.intp]:
    """Choose ``n_seen`` classes that are far from all others.

    Classes are clustered. Starting with one cluster, whole clusters join the group, always the one nearest to it (mean
    cosine), while they fit. Single classes nearest to the group fill the rest. Every cluster is tried as the start (of
    one that is too large, the classes nearest to its mean count); the group least similar to the classes outside wins.

    Parameters
    ----------
    centres : ndarray, (K, D)
        Unit rows, see `class_centres`.
    n_seen : int
        1 to K - 1.
    clustering : {"agglomerative", "kmeans"}
        Average linkage on cosine distance, or k-means of the unit rows.
    clusters : int, optional
        2 to K; by default the square root of K, rounded up.
    seed : int
        Of k-means; the other one has nothing random.

    Returns
    -------
    ndarray of int, (n_seen,)
        Ascending column numbers.

    Raises
    ------
    UserError
        Unknown clustering, a number out of range.
    """
    k = len(centres)
    count = max(2, int(np.ceil(np.sqrt(k)))) if clusters is None else clusters
    if not 2 <= count <= k:
        raise UserError("number of clusters out of range", given=count, remedy=f"choose 2 to {k}")
    if not 1 <= n_seen < k:
        raise UserError("number of seen classes out of range", given=n_seen, remedy=f"choose 1 to {k - 1}")
    groups = _cluster(centres, clustering, count, seed)
    cosine = centres @ centres.T
    best: tuple[float, list[int]] | None = None
    for start in groups:
        chosen = _grow(start, groups, cosine, n_seen)
        value = group_similarity(cosine, chosen)
        if best is None or value < best[0] - 1e-12:
            best = value, chosen
    assert best is not None
    return np.sort(np.asarray(best[1], dtype=np.intp))


def group_similarity(cosine: NDArray[np.float64], chosen: Sequence[int]) -> float:
    """Mean cosine between the classes of a group and those outside: low where the two lie far apart."""
    inside = np.zeros(len(cosine), dtype=bool)
    inside[list(chosen)] = True
    return float(cosine[np.ix_(inside, ~inside)].mean())


def _cluster(centres: NDArray[np.float64], clustering: str, count: int, seed: int) -> list[list[int]]:
    from sklearn.cluster import AgglomerativeClustering, KMeans

    if not np.linalg.norm(centres, axis=1).all():
        given = f"class {int(np.flatnonzero(np.linalg.norm(centres, axis=1) == 0)[0])}"
        raise UserError("a class mean is zero, so it is similar to nothing", where="features", given=given)
    if clustering == "agglomerative":
        labels = AgglomerativeClustering(n_clusters=count, metric="cosine", linkage="average").fit_predict(centres)
    elif clustering == "kmeans":
        labels = KMeans(n_clusters=count, n_init=10, random_state=seed).fit_predict(centres)
    else:
        raise unknown_name("clustering", clustering, ["agglomerative", "kmeans"])
    return [np.flatnonzero(labels == c).tolist() for c in np.unique(labels)]


def _grow(start: list[int], groups: list[list[int]], cosine: NDArray[np.float64], n_seen: int) -> list[int]:
    own = cosine[np.ix_(start, start)].mean(axis=1)
    chosen = [start[i] for i in np.argsort(-own, kind="stable")[:n_seen]]
    left = [g for g in groups if g is not start]
    while left:
        nearest = max(left, key=lambda g: float(cosine[np.ix_(g, chosen)].mean()))
        left.remove(nearest)
        if len(nearest) <= n_seen - len(chosen):
            chosen += nearest
        else:
            break
    rest = np.setdiff1d(np.arange(len(cosine)), chosen)
    near = cosine[np.ix_(rest, chosen)].mean(axis=1)
    return chosen + rest[np.argsort(-near, kind="stable")][: n_seen - len(chosen)].tolist()

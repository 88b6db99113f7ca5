"""Features in the plane (A8 of FTC, arXiv 2409.16223): t-SNE and PCA by group, and whether S and U separate.

The paper looks at t-SNE pictures: samples of seen and absent classes do not fall apart into two groups. The two
numbers beside the picture are ours.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.metrics import as_array

from ft_calibrate.analyses_features import normalized, unit_class_means
from ft_calibrate.groups import ClassGroups

Floats = NDArray[np.float64]
Method = Literal["tsne", "pca"]
METHODS: tuple[Method, ...] = ("tsne", "pca")


def sample_rows(labels: Any, groups: ClassGroups, max_points: int = 1000, seed: int = 0) -> NDArray[np.intp]:
    """Sorted rows of at most ``max_points`` samples of S and U, drawn so that no class crowds out another.

    Parameters
    ----------
    labels
        (N,) columns; other samples are never drawn.
    max_points
        Greatest number of rows.
    seed
        Of the draw.
    """
    y = as_array(labels)
    rows = np.flatnonzero(np.isin(y, np.concatenate([groups.seen, groups.absent])))
    rng = np.random.default_rng(seed)
    rows = rng.permutation(rows)
    # The i-th sample of its class comes before every (i+1)-th one, so a cut takes equally from all classes.
    order = np.argsort(y[rows], kind="stable")
    _, start, count = np.unique(y[rows][order], return_index=True, return_counts=True)
    turn = np.empty(len(rows), np.intp)
    turn[order] = np.arange(len(rows)) - np.repeat(start, count)
    return np.sort(rows[np.argsort(turn, kind="stable")][:max_points])


def project(features: Any, method: str = "tsne", seed: int = 0, perplexity: float = 30.0) -> Floats:
    """Normalised features (n, D) as points (n, 2).

    Parameters
    ----------
    features
        (n, D), at least 3 samples.
    method
        ``"tsne"`` or ``"pca"``.
    seed
        Of t-SNE.
    perplexity
        Of t-SNE; lowered to (n - 1) / 3 for few samples.

    Raises
    ------
    UserError
        Unknown method or fewer than 3 samples.
    """
    f = normalized(features)
    if len(f) < 3:
        raise UserError("too few samples to project", given=len(f), remedy="give 3 or more")
    from sklearn.decomposition import PCA

    if method == "pca":
        points = PCA(min(2, f.shape[1]), random_state=seed).fit_transform(f)
        return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    if method != "tsne":
        raise UserError("unknown projection", given=repr(method), remedy=f"use {' or '.join(METHODS)}")
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if f.shape[1] > 50:  # distances of many dimensions are dear; 50 components keep the neighbourhoods
        f = PCA(min(50, len(f)), random_state=seed).fit_transform(f)
    init = "pca" if f.shape[1] >= 2 else "random"
    tsne = TSNE(2, perplexity=min(perplexity, (len(f) - 1) / 3), init=init, random_state=seed, learning_rate="auto")
    with threadpool_limits(1, user_api="openmp"):  # its threads wait for each other: on a busy machine, for minutes
        return np.asarray(tsne.fit_transform(f.astype(np.float32)), np.float64)


def group_separation(
    features: Any, labels: Any, groups: ClassGroups, max_points: int = 2000, seed: int = 0
) -> dict[str, float]:
    """How far S and U fall apart in feature space; the silhouette of the classes stands beside it as a yardstick.

    Returns
    -------
    dict
        ``silhouette_groups`` and ``silhouette_classes`` (in [-1, 1]; about 0: no separation), of cosine distances over
        at most ``max_points`` samples; ``mixed_neighbours``, the share of classes whose nearest other class mean is of
        the other group, and ``mixed_by_chance``, the share that random groups of these sizes would have. NaN where a
        group or class is missing.
    """
    f, y = normalized(features), as_array(labels)
    rows = sample_rows(y, groups, max_points, seed)
    in_u = np.isin(y[rows], groups.absent)
    out = {
        "silhouette_groups": _silhouette(f[rows], in_u),
        "silhouette_classes": _silhouette(f[rows], y[rows]),
        "mixed_neighbours": float("nan"),
        "mixed_by_chance": float("nan"),
    }
    means = unit_class_means(f, y, groups.num_classes)
    columns = np.concatenate([groups.seen, groups.absent])
    columns = columns[~np.isnan(means[columns]).any(1)]
    of_u = np.isin(columns, groups.absent)
    if of_u.any() and not of_u.all():
        similarity = means[columns] @ means[columns].T
        np.fill_diagonal(similarity, -np.inf)
        out["mixed_neighbours"] = float((of_u[similarity.argmax(1)] != of_u).mean())
        n, n_u = len(columns), int(of_u.sum())
        out["mixed_by_chance"] = 2 * n_u * (n - n_u) / (n * (n - 1))
    return out


def _silhouette(features: Floats, parts: NDArray[Any]) -> float:
    from sklearn.metrics import silhouette_score

    if not 2 <= len(np.unique(parts)) <= len(parts) - 1:
        return float("nan")
    return float(silhouette_score(features, parts, metric="cosine"))

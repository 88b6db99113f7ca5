"""Feature movement (A7 of FTC, arXiv 2409.16223): how far features lie from class, group and overall means.

The definitions follow the behaviour of the published analysis: features are L2-normalised; class means are means of
those, normalised again, and taken from the samples' own split; group means and the overall mean are not normalised
again; the overall mean is that of the *training* features, for test samples too. "Train" is target-domain training
data of all classes, so this is diagnosis only: it uses labels of absent classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.metrics import as_array

from ft_calibrate.groups import ClassGroups

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Split = tuple[Any, Any]  # features (N, D), labels (N,)

SPLITS = ("train", "test")
TARGETS = ("own_class", "own_group", "other_group", "overall")
# The 16 series of distances, in the order of the published table, and the 3 x 2 of the movement of class means.
DISTANCES = tuple(f"{split}/{group}/{target}" for target in TARGETS for split in SPLITS for group in ("S", "U"))
MOVEMENTS = tuple(f"{split}/{group}" for split in SPLITS for group in ("all", "S", "U"))


def normalized(features: Any) -> Floats:
    """Rows scaled to unit L2 norm, float64; a zero row stays zero."""
    f = as_array(features).astype(np.float64)
    if f.ndim != 2:
        raise UserError("features must be a (samples, features) matrix", given=f"shape {f.shape}")
    return f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-12)


def unit_class_means(features: Any, labels: Any, num_classes: int) -> Floats:
    """Normalised means (K, D) of the normalised features of each class; NaN rows for classes without samples."""
    f, y = normalized(features), as_array(labels)
    total = np.zeros((num_classes, f.shape[1]))
    np.add.at(total, y[y >= 0], f[y >= 0])
    count = np.bincount(y[y >= 0], minlength=num_classes)
    mean = normalized(total / np.maximum(count, 1)[:, None])
    mean[count == 0] = np.nan
    return mean


def feature_distances(train: Split | None, test: Split, groups: ClassGroups) -> dict[str, float]:
    """A7: mean distances of S and U samples to own class mean, own-group, other-group and overall mean.

    Parameters
    ----------
    train
        ``(features (N, D), labels (N,))`` of target training data of all classes. None: the series of ``train`` are
        NaN, and the overall mean of the test samples is their own.
    test
        The same for test data.
    groups
        S and U; samples of neither are left out.

    Returns
    -------
    dict
        The 16 keys of `DISTANCES`; Euclidean distances between unit vectors and means, in [0, 2].
    """
    out = dict.fromkeys(DISTANCES, float("nan"))
    splits = {name: _split(value, groups) for name, value in (("train", train), ("test", test)) if value is not None}
    overall = _mean(splits["train" if "train" in splits else "test"][0])
    for name, (f, y) in splits.items():
        class_mean = unit_class_means(f, y, groups.num_classes)
        in_group = {"S": np.isin(y, groups.seen), "U": np.isin(y, groups.absent)}
        group_mean = {group: _mean(f[rows]) for group, rows in in_group.items()}
        for group, other in (("S", "U"), ("U", "S")):
            rows = in_group[group]
            targets = (class_mean[y[rows]], group_mean[group], group_mean[other], overall)
            for target, mean in zip(TARGETS, targets):
                if rows.any():
                    out[f"{name}/{group}/{target}"] = float(np.linalg.norm(f[rows] - mean, axis=1).mean())
    return out


def class_mean_movement(
    before: Mapping[str, Floats], after: Mapping[str, Floats], groups: ClassGroups
) -> dict[str, float]:
    """A7: mean distance that the class means moved, over all classes, S and U, for each split.

    Parameters
    ----------
    before, after
        ``{"train": (K, D), "test": (K, D)}`` of `unit_class_means` at two epochs; a split may be absent. The two must
        be features of one space: consecutive epochs of one model, or a model before and after fine-tuning.

    Returns
    -------
    dict
        The 6 keys of `MOVEMENTS`, in [0, 2]; NaN where a split or group is absent.
    """
    out = dict.fromkeys(MOVEMENTS, float("nan"))
    columns = {"all": np.arange(groups.num_classes), "S": groups.seen, "U": groups.absent}
    for split in SPLITS:
        if split not in before or split not in after:
            continue
        if before[split].shape != after[split].shape:
            log.warning("class means of different sizes, movement left out: %s", split)
            continue
        moved = np.linalg.norm(after[split] - before[split], axis=1)
        for name, chosen in columns.items():
            kept = moved[chosen][~np.isnan(moved[chosen])]
            if len(kept):
                out[f"{split}/{name}"] = float(kept.mean())
    return out


def feature_movement(
    records: Sequence[tuple[Split | None, Split]], groups: ClassGroups
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """A7 over a sequence of models (epochs, or before and after): distances of each, movements between neighbours.

    Parameters
    ----------
    records
        ``(train, test)`` of each model, as in `feature_distances`.

    Returns
    -------
    distances, movements
        As many dicts as models, and one fewer.
    """
    distances = [feature_distances(train, test, groups) for train, test in records]
    means = [class_means_of(train, test, groups) for train, test in records]
    movements = [class_mean_movement(a, b, groups) for a, b in pairwise(means)]
    return distances, movements


def class_means_of(train: Split | None, test: Split, groups: ClassGroups) -> dict[str, Floats]:
    """`unit_class_means` of both splits, for `class_mean_movement`."""
    means = {"test": unit_class_means(*_split(test, groups), groups.num_classes)}
    if train is not None:
        means["train"] = unit_class_means(*_split(train, groups), groups.num_classes)
    return means


def _split(split: Split, groups: ClassGroups) -> tuple[Floats, NDArray[Any]]:
    """Normalised features and labels of the samples of S and U."""
    f, y = normalized(split[0]), as_array(split[1])
    if y.shape != f.shape[:1]:
        raise UserError("features and labels of different lengths", given=f"{len(f)} and {y.shape}")
    kept = np.isin(y, np.concatenate([groups.seen, groups.absent]))
    return f[kept], y[kept]


def _mean(features: Floats) -> Floats:
    return features.mean(axis=0) if len(features) else np.full(features.shape[1], np.nan)

"""Which column of the logits is which class, from the labels that a scikit-learn estimator is given. Ours."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from vfm_core.errors import UserError

from ft_calibrate.inputs import untensored

__all__ = ["checked_labels", "column_labels", "label_places"]


def checked_labels(y: Any, rows: int) -> NDArray[Any]:
    """Labels (N,) as a vector; raises `ValueError` for values that are no class labels or another length."""
    labels = column_or_1d(np.asarray(untensored(y)), warn=True)
    check_classification_targets(labels)
    if len(labels) != rows:
        raise UserError("X and y differ in length", given=f"{rows} rows, {len(labels)} labels")
    return labels


def column_labels(classes: Any, labels: NDArray[Any] | None, k: int) -> NDArray[Any]:
    """The labels of the K columns: given, or the sorted labels when there are K of them, or the column numbers."""
    if classes is not None:
        found = np.asarray(classes)
        if found.shape != (k,) or len(np.unique(found)) < k:
            given = f"{found.shape} for {k} columns"
            raise UserError("classes must name every column once", where="classes", given=given)
        return found
    if labels is None:
        return np.arange(k)
    unique = np.unique(labels)
    if len(unique) == k:
        return unique
    if unique.dtype.kind in "iuf" and unique[0] >= 0 and unique[-1] < k and (unique == unique.astype(int)).all():
        return np.arange(k)
    given = f"{len(unique)} classes in y, {k} columns"
    remedy = "pass classes=, the label of every column"
    raise UserError("the labels do not tell which column is which class", where="y", given=given, remedy=remedy)


def label_places(labels: Any, classes: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Columns of ``labels``, any collection of entries of ``classes`` (K,)."""
    values = np.asarray(sorted(labels) if isinstance(labels, set | frozenset) else untensored(labels))
    order = np.argsort(classes, kind="stable")
    try:
        at = np.minimum(np.searchsorted(classes[order], values), len(classes) - 1)
        columns = order[at]
        unknown = values[classes[columns] != values]
    except TypeError:  # numbers against strings
        columns, unknown = np.empty(0, np.intp), values
    if len(unknown):
        given = ", ".join(str(v) for v in np.unique(unknown)[:5])
        raise UserError("labels that are no class of a column", where=where, given=given, remedy="look at classes_")
    return columns.astype(np.int64)

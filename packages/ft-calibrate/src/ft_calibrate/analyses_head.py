"""Analyses of FTC (arXiv 2409.16223) on head weights: class relationship (A4) and head norms (A6).

The head rows of the absent classes move together (so their order is kept), and the norms of the seen rows grow more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.metrics import as_array

from ft_calibrate.groups import ClassGroups

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClassRelationship:
    """A4: cosines between the changes of the head rows.

    Attributes
    ----------
    cosine : (K, K)
        ``cos(Delta w_a, Delta w_b)``; NaN where a row did not change.
    within_S, within_U, between : float
        Mean over pairs of different classes inside S, inside U, and of one class of each.
    """

    cosine: Floats
    within_S: float
    within_U: float
    between: float


def class_relationship(weight_before: Any, weight_after: Any, groups: ClassGroups) -> ClassRelationship:
    """A4: do the head rows of the absent classes move together? ``Delta w_c = w_c(after) - w_c(before)``.

    Parameters
    ----------
    weight_before, weight_after
        (K, D) head weights (see `head_weights`).

    Raises
    ------
    UserError
        Weights of different shapes, or not one row per class.
    """
    before, after = _weight(weight_before, groups), _weight(weight_after, groups)
    if before.shape != after.shape:
        given = f"{before.shape} before and {after.shape} after"
        raise UserError("head weights of different shapes", given=given, remedy="give the heads of one architecture")
    delta = after - before
    norm = np.linalg.norm(delta, axis=1)
    scale = np.maximum(np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1))
    moved = norm > 1e-7 * np.maximum(scale, 1e-30)  # rows equal up to storage precision have no direction
    unit = np.where(moved[:, None], delta / np.where(moved, norm, 1.0)[:, None], np.nan)
    cosine = np.clip(unit @ unit.T, -1.0, 1.0)

    def within(columns: NDArray[np.intp]) -> float:
        block = cosine[np.ix_(columns, columns)]
        return _mean(block[~np.eye(len(columns), dtype=bool)])

    between = _mean(cosine[np.ix_(groups.seen, groups.absent)].ravel())
    return ClassRelationship(cosine, within(groups.seen), within(groups.absent), between)


def head_norms(weight: Any, groups: ClassGroups) -> dict[str, float]:
    """A6: mean L2 norm of the head rows ``w_c`` of S and of U (NaN for an empty group)."""
    norm = np.linalg.norm(_weight(weight, groups), axis=1)
    return {"S": _mean(norm[groups.seen]), "U": _mean(norm[groups.absent])}


def head_weights(source: Any) -> Floats:
    """The (K, D) weight of a classification head, from an array, a (weight, bias) pair, a layer or a `Classifier`.

    A 1x1 convolution is flattened. A cosine head gives its stored rows; their norms do not enter its logits.

    Raises
    ------
    UserError
        Nothing of these, or a weight that is not a matrix.
    """
    if isinstance(source, tuple | list) and len(source) == 2 and getattr(source[0], "ndim", 0) >= 2:
        source = source[0]
    if hasattr(source, "head") and hasattr(source, "features_and_logits"):
        from ft_calibrate.head import base_layer

        source = base_layer(source.head)
    weight = getattr(source, "weight", source)
    try:
        array = as_array(weight).astype(np.float64)
    except (TypeError, ValueError) as e:
        raise UserError("no head weights", given=type(source).__name__, remedy="give a (K, D) array or a layer") from e
    if array.ndim > 2 and array.shape[2:] == (1,) * (array.ndim - 2):
        array = array.reshape(array.shape[:2])
    if array.ndim != 2:
        raise UserError("head weights must be a (classes, features) matrix", given=f"shape {array.shape}")
    return array


def _weight(weight: Any, groups: ClassGroups) -> Floats:
    array = head_weights(weight)
    if len(array) != groups.num_classes:
        given = f"{len(array)} rows for {groups.num_classes} classes"
        raise UserError("head weights do not fit the classes", given=given, remedy="give the head of this classifier")
    return array


def _mean(values: Floats) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")

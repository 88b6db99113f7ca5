"""Splits of what is seen: pseudo-seen and pseudo-absent classes, and training and test samples of every class.

The halving of S is that of pseudo cross-validation in FTC, "Fine-Tuning is Fine, if Calibrated" (arXiv 2409.16223); the
split of every class's samples 7:3 is that of HT, "Holistic Transfer" (arXiv 2311.01420).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from vfm_core.errors import UserError, unknown_name

__all__ = ["per_class_split", "pseudo_splits"]

_log = logging.getLogger(__name__)


def pseudo_splits(
    seen: Sequence[Any], folds: int = 3, seed: int = 0, share: float = 0.5
) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Split S at random into pseudo-seen and pseudo-absent classes, once per fold, without touching U (FTC, PCV).

    Parameters
    ----------
    seen : sequence
        S, at least 2 classes: names or column numbers.
    folds : int
        How many; fold r is the same whatever their number.
    seed : int
        Of the choice.
    share : float
        Pseudo-seen part of S, in (0, 1); half in the paper (15 of 30). Rounded up, and at least one class is left.

    Returns
    -------
    list of (pseudo_seen, pseudo_absent)
        Tuples in the order of ``seen``; together they are S. Folds differ as long as there are choices left.

    Raises
    ------
    UserError
        Too few classes or folds, a share out of range, a class twice.
    """
    s = list(seen.tolist() if isinstance(seen, np.ndarray) else seen)
    if len(s) < 2:
        raise UserError("too few seen classes for pseudo splits", given=len(s), remedy="2 or more are needed")
    if len(set(s)) != len(s):
        raise UserError("seen class given twice", given=next(c for c in s if s.count(c) > 1))
    if folds < 1 or not 0 < share < 1:
        raise UserError("folds must be positive and share in (0, 1)", given=f"folds {folds}, share {share}")
    count = min(max(math.ceil(share * len(s) - 1e-9), 1), len(s) - 1)
    taken: set[frozenset[int]] = set()
    result = []
    for r in range(folds):
        rng = np.random.default_rng([seed, r])
        if len(taken) == math.comb(len(s), count):
            _log.warning("%d folds over %d seen classes repeat: there are %d choices", folds, len(s), len(taken))
            taken = set()
        chosen = frozenset(rng.permutation(len(s))[:count].tolist())
        while chosen in taken:
            chosen = frozenset(rng.permutation(len(s))[:count].tolist())
        taken.add(chosen)
        result.append(
            (
                tuple(c for i, c in enumerate(s) if i in chosen),
                tuple(c for i, c in enumerate(s) if i not in chosen),
            )
        )
    return result


def per_class_split(
    labels: ArrayLike, train: float = 0.7, seed: int = 0, round_up: str = "test"
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Split the samples of every class, 7:3 unless told otherwise.

    Parameters
    ----------
    labels : array-like of int, (N,)
        Class of each sample; samples with a negative label are in neither part.
    train : float
        Share of the first part, in (0, 1).
    seed : int
        Of the choice, which depends on a class's number and its own samples only: other classes do not matter.
    round_up : {"test", "train"}
        Which part gets the odd sample: a class of 15 gives 10 and 5, or 11 and 4.

    Returns
    -------
    train, test : ndarray of int
        Ascending positions. A class of one sample is in ``train``; larger ones are in both parts.

    Raises
    ------
    UserError
        A share out of range.
    """
    if not 0 < train < 1:
        raise UserError("share of the training part out of range", given=train, remedy="choose from (0, 1)")
    if round_up not in ("train", "test"):
        raise unknown_name("part to round up", round_up, ["train", "test"])
    y = np.asarray(labels).reshape(-1)
    first: list[NDArray[np.intp]] = []
    second: list[NDArray[np.intp]] = []
    for c in np.unique(y[y >= 0]):
        rows = np.flatnonzero(y == c)
        exact = train * len(rows)
        count = math.floor(exact + 1e-9) if round_up == "test" else math.ceil(exact - 1e-9)
        count = min(max(count, 1), max(len(rows) - 1, 1))
        rows = rows[np.random.default_rng([seed, int(c)]).permutation(len(rows))]
        first.append(rows[:count])
        second.append(rows[count:])
    empty = np.empty(0, dtype=np.intp)
    return np.sort(np.concatenate([empty, *first])), np.sort(np.concatenate([empty, *second]))

"""Which columns of the head are seen, absent or remaining, and which of them compete.

FTC (arXiv 2409.16223), setting: Y is the label set of the head (K columns), S the classes of the fine-tuning data
("seen"), U the classes that those data lack ("absent"). The published code knows a third group, R, the remaining
columns: neither fine-tuned nor evaluated as absent. What happens to R is a choice, ``remaining``:

- ``"absent"`` (default): they are moved by gamma together with U;
- ``"keep"``: they stay in the competition as they are;
- ``"exclude"``: they are masked out (score -inf).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError, closest
from vfm_core.metrics import as_array

__all__ = ["REMAINING", "ClassGroups", "Remaining", "class_groups", "label_columns"]

log = logging.getLogger(__name__)

Remaining = Literal["absent", "keep", "exclude"]
REMAINING: tuple[Remaining, ...] = get_args(Remaining)
Columns = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class ClassGroups:
    """The K columns of a head, split into seen (S), absent (U) and remaining (R).

    Parameters
    ----------
    classes : tuple of str
        Names of the columns, in order; all different.
    seen, absent, remaining : ndarray of intp
        Sorted column numbers; disjoint, and together 0..K-1. Made by `class_groups`.
    """

    classes: tuple[str, ...]
    seen: Columns
    absent: Columns
    remaining: Columns

    @property
    def num_classes(self) -> int:
        """K, the number of columns."""
        return len(self.classes)

    def names(self, columns: Any) -> list[str]:
        """Class names of the given column numbers."""
        return [self.classes[int(c)] for c in np.asarray(columns).ravel()]

    def moved(self, remaining: str = "absent") -> Columns:
        """Columns M that receive gamma: U, and R too when ``remaining`` is ``"absent"``. Sorted."""
        return np.union1d(self.absent, self.remaining) if _checked(remaining) == "absent" else self.absent

    def fixed(self, remaining: str = "absent") -> Columns:
        """Columns F that compete without gamma: S, and R too when ``remaining`` is ``"keep"``. Sorted."""
        return np.union1d(self.seen, self.remaining) if _checked(remaining) == "keep" else self.seen

    def columns(self, remaining: str = "absent") -> Columns:
        """Columns that compete at all: F and M together. Sorted."""
        return np.union1d(self.fixed(remaining), self.moved(remaining))

    def excluded(self, remaining: str = "absent") -> Columns:
        """Columns that are masked out: R when ``remaining`` is ``"exclude"``, else none. Sorted."""
        return self.remaining if _checked(remaining) == "exclude" else self.remaining[:0]

    @property
    def group_of(self) -> NDArray[np.str_]:
        """``"S"``, ``"U"`` or ``"R"`` for every column, (K,)."""
        found = np.full(self.num_classes, "R", dtype="<U1")
        found[self.seen], found[self.absent] = "S", "U"
        return found

    def __repr__(self) -> str:
        parts = f"seen={len(self.seen)}, absent={len(self.absent)}, remaining={len(self.remaining)}"
        return f"ClassGroups({self.num_classes} classes: {parts})"


def class_groups(
    classes: int | Sequence[str], seen: Any, absent: Any = None, *, where: str | Path | None = None
) -> ClassGroups:
    """Split the columns of a head into seen, absent and remaining.

    Parameters
    ----------
    classes : int or sequence of str
        The names of the K columns, or K alone (the names are then ``"0"`` .. ``"K-1"``).
    seen, absent
        Class names, column numbers, or a boolean mask (K,). A string that is no class name but a decimal number is a
        column number. ``absent=None``: every class that is not seen, and a warning when there is none.
    where
        The file or option that the groups come from, for messages.

    Returns
    -------
    ClassGroups

    Raises
    ------
    UserError
        No seen class, unknown or repeated classes, S and U overlapping, or class names that repeat.

    Examples
    --------
    >>> class_groups(["cat", "dog", "owl"], ["cat"]).names([1, 2])
    ['dog', 'owl']
    """
    names = tuple(map(str, range(classes) if isinstance(classes, int) else classes))
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise UserError("class names repeat", where=where, given=_listed(repeated), remedy="name every column once")
    place = {name: i for i, name in enumerate(names)}
    s = _group(seen, place, "seen", where)
    if len(s) == 0:
        raise UserError("no seen class", where=where, remedy="name the classes of the fine-tuning data")
    rest = np.setdiff1d(np.arange(len(names), dtype=np.intp), s)
    u = rest if absent is None else _group(absent, place, "absent", where)
    both = np.intersect1d(s, u)
    if len(both):
        raise UserError(
            "classes are both seen and absent",
            where=where,
            given=_listed([names[i] for i in both]),
            remedy="list each class in one group",
        )
    if len(s) == len(names) and absent is None:  # one who says that nothing is absent knows it
        log.warning("all %d classes are seen: nothing is absent, gamma is 0", len(names))
    return ClassGroups(names, s, u, np.setdiff1d(rest, u))


def label_columns(
    labels: Any, classes: Sequence[str], *, rows: int | None = None, where: str | Path | None = None
) -> NDArray[np.int64]:
    """Column numbers of labels.

    Parameters
    ----------
    labels
        (N,) class names or column numbers. None, ``""``, NaN and -1 mean unknown. A string that is no class name but a
        whole number is a column number.
    classes
        Names of the K columns.
    rows
        N, where it is known: any other number of labels is an error.
    where
        The file or field that the labels come from, for messages.

    Returns
    -------
    ndarray of int64
        (N,) in 0..K-1, or -1 where the label is unknown.

    Raises
    ------
    UserError
        Labels that are no class, named with the closest ones, or not one label per row.
    """
    columns = _columns_of_labels(labels, classes, where)
    if rows is not None and len(columns) != rows:
        raise UserError("logits and labels differ in length", where=where, given=f"{rows} rows, {len(columns)} labels")
    return columns


def _columns_of_labels(labels: Any, classes: Sequence[str], where: str | Path | None) -> NDArray[np.int64]:
    values = labels if isinstance(labels, (list, tuple)) else as_array(labels)
    array = np.asarray(values) if _all_integers(values) else None
    k = len(classes)
    if array is not None:
        if array.ndim != 1:
            raise UserError("labels must be a vector", where=where, given=f"shape {array.shape}")
        outside = (array < -1) | (array >= k)
        if outside.any():
            raise _unknown(sorted(set(array[outside].tolist())), classes, "labels", where)
        return array.astype(np.int64)
    place = {str(name): i for i, name in enumerate(classes)}
    items = list(values.ravel() if isinstance(values, np.ndarray) and values.ndim == 1 else values)
    found: dict[Any, int | None] = {}
    columns = np.empty(len(items), dtype=np.int64)
    unknown: list[Any] = []
    for i, item in enumerate(items):
        key = item.item() if isinstance(item, np.generic) else item
        if isinstance(key, float) and math.isnan(key):  # nan differs from itself: no dictionary key
            columns[i] = -1
            continue
        if key not in found:
            found[key] = _label_column(key, place, k)
            if found[key] is None:
                unknown.append(key)
        column = found[key]
        columns[i] = -1 if column is None else column
    if unknown:
        raise _unknown(unknown, classes, "labels", where)
    return columns


def _all_integers(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "iu"
    return bool(values) and all(isinstance(v, Integral) and not isinstance(v, bool) for v in values)


def _label_column(label: Any, place: dict[str, int], k: int) -> int | None:
    """Column of one label; -1 unknown on purpose, None no such class."""
    if label is None or (isinstance(label, str) and not label.strip()):
        return -1
    if isinstance(label, str):
        return _by_name(label, place, lowest=-1)
    if isinstance(label, bool) or not float(label).is_integer():
        return None
    return int(label) if -1 <= int(label) < k else None


def _by_name(name: str, place: dict[str, int], lowest: int = 0) -> int | None:
    if name in place:
        return place[name]
    text = name.strip()
    if text in place:
        return place[text]
    digits = text[1:] if lowest < 0 and text.startswith("-") else text
    if not (digits.isascii() and digits.isdigit()):
        return None
    column = int(text)
    return column if lowest <= column < len(place) else None


def _group(given: Any, place: dict[str, int], kind: str, where: str | Path | None) -> Columns:
    """Sorted columns of one group given by names, numbers or a mask."""
    if isinstance(given, str):
        given = [given]
    elif isinstance(given, (set, frozenset)):
        given = sorted(given, key=str)
    array = None if isinstance(given, (list, tuple)) else as_array(given)
    if isinstance(given, (list, tuple)) and given and all(isinstance(v, (bool, np.bool_)) for v in given):
        array = np.asarray(given)
    if array is not None and array.dtype == bool:
        if array.shape != (len(place),):
            raise UserError(
                f"the mask of {kind} classes must have one entry per class",
                where=where,
                given=f"shape {array.shape} for {len(place)} classes",
            )
        return np.flatnonzero(array).astype(np.intp)
    items = [v.item() if isinstance(v, np.generic) else v for v in (given if array is None else array.ravel())]
    columns: list[int] = []
    unknown: list[Any] = []
    for item in items:
        if isinstance(item, str):
            column = _by_name(item, place)
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and float(item).is_integer():
            column = int(item) if 0 <= item < len(place) else None
        elif hasattr(item, "__index__"):  # a one-element tensor
            column = int(item) if 0 <= int(item) < len(place) else None
        else:
            column = None
        if column is None:
            unknown.append(item)
        else:
            columns.append(column)
    if unknown:
        raise _unknown(unknown, list(place), f"{kind} classes", where)
    by_place = [(item, c) for item, c in zip(items, columns) if isinstance(item, str) and item.strip() not in place]
    if by_place and any(name.isdecimal() and i != int(name) for name, i in place.items()):
        item, column = by_place[0]
        log.warning(
            "%s is not the name of a class and is read as a column number: the class named %s; classes are named by "
            "numbers here, so give their names", item, list(place)[column],
        )  # fmt: skip
    found, counts = np.unique(np.asarray(columns, dtype=np.intp), return_counts=True)
    if (counts > 1).any():
        names = list(place)
        raise UserError(
            f"{kind} classes repeat",
            where=where,
            given=_listed([names[i] for i in found[counts > 1]]),
            remedy="list each class once",
        )
    return found


def _unknown(items: Sequence[Any], classes: Sequence[str], kind: str, where: str | Path | None) -> UserError:
    near = [name for item in items[:3] if isinstance(item, str) for name in closest(item, classes, n=1)]
    if near:
        remedy = f"did you mean {_listed(list(dict.fromkeys(near)))}?"
    elif len(classes) == 0:
        remedy = "no class is known"
    else:
        remedy = f"the {len(classes)} classes are {_listed(classes)}, or their column numbers 0..{len(classes) - 1}"
    return UserError(f"{kind} that are not among the classes", where=where, given=_listed(items), remedy=remedy)


def _listed(items: Sequence[Any], most: int = 8) -> str:
    """Some names for a message; one with a comma in double quotes, so that it does not read as two."""
    shown = ", ".join(f'"{item}"' if "," in str(item) else str(item) for item in items[:most])
    return f"{shown}, ... ({len(items)} in all)" if len(items) > most else shown


def _checked(remaining: str) -> str:
    if remaining not in REMAINING:
        raise UserError(
            "unknown treatment of the remaining classes", given=remaining, remedy=f"use {', '.join(REMAINING)}"
        )
    return remaining

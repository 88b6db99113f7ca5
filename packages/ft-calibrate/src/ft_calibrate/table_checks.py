"""Checks of score files: what is wrong is found before it can shift a result, and told by file, row and column.

The rules are ours: NaN and infinities are errors, except a column that is -inf from top to bottom (a masked class);
rows that sum to one are probabilities, not logits; a sample that is in both the data that chose gamma and the data
that judge it is a leak; classes are compared by name, never by position when names are known.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

__all__ = [
    "PROBABILITY_FLOOR",
    "FiniteChecker",
    "IdCollector",
    "check_finite",
    "column_order",
    "looks_like_probabilities",
    "masked_columns",
    "probability_warning",
    "to_log",
    "warn_duplicates",
]

log = logging.getLogger(__name__)

PROBABILITY_FLOOR = 1e-30
"""Probabilities below this are raised to it before the logarithm."""


def masked_columns(logits: NDArray[Any]) -> NDArray[np.bool_]:
    """Which columns are -inf in every row, (K,): masked classes. All False for no rows."""
    if len(logits) == 0:
        return np.zeros(logits.shape[1], dtype=bool)
    return np.asarray(np.isneginf(logits).all(axis=0))


class FiniteChecker:
    """Finds NaN and infinities in (N, K) scores that come in pieces.

    Parameters
    ----------
    classes : sequence of str
        Names of the K columns.
    where : str or Path, optional
        The file, for messages.
    masked : ndarray of bool, optional
        (K,) columns that are known to be -inf throughout. Without it they are learned from the first piece, and a
        later piece that contradicts it is an error.

    Notes
    -----
    The message is the same whether the scores come in one piece or in many: it names the first bad value in row order.
    """

    def __init__(
        self, classes: Sequence[str], where: str | Path | None = None, masked: NDArray[np.bool_] | None = None
    ) -> None:
        self.classes, self.where, self.masked = list(classes), where, masked
        self.rows = 0
        self._first = "row 0"

    def bad_rows(self, logits: NDArray[Any]) -> NDArray[np.bool_]:
        """Rows (N,) with a NaN, a +inf, or a -inf outside the masked columns."""
        if self.masked is None:
            self.masked = masked_columns(logits)
        bad = ~np.isfinite(logits)
        bad[:, self.masked] &= ~np.isneginf(logits[:, self.masked])
        return bad.any(axis=1)

    def check(self, logits: NDArray[Any], ids: Sequence[str] | None = None) -> None:
        """Check the next piece.

        Raises
        ------
        UserError
            Naming the file, the first bad row (its id where ids are known) and the column.
        """
        if len(logits) == 0:
            return
        if self.rows == 0:
            self._first = _row_name(0, 0, ids)
        if self.masked is None:
            self.masked = masked_columns(logits)
        finite = np.isfinite(logits)
        if not finite.all() or self.masked.any():
            half = self.masked & ~np.isneginf(logits).all(axis=0)
            if half.any():  # was -inf from the first row on, and is not any more
                raise self._error(-np.inf, self._first, int(np.argmax(half)))
            finite[:, self.masked] = True
            rows, columns = np.nonzero(~finite)
            if len(rows):
                row, column = int(rows[0]), int(columns[0])
                raise self._error(float(logits[row, column]), _row_name(self.rows, row, ids), column)
        self.rows += len(logits)

    def _error(self, value: float, row: str, column: int) -> UserError:
        if np.isneginf(value):
            remedy = "-inf is for a class masked in every row; mask the whole column, or drop such rows with --nan drop"
        else:
            remedy = "mend the file, or drop and count such rows with --nan drop"
        what = "NaN" if np.isnan(value) else "-inf" if value < 0 else "+inf"
        name = self.classes[column] if column < len(self.classes) else str(column)
        return UserError(f"{what} score", where=self.where, given=f"{row}, column {name}", remedy=remedy)


def check_finite(
    logits: Any, classes: Sequence[str] | None = None, ids: Sequence[str] | None = None, where: str | Path | None = None
) -> None:
    """Check that (N, K) scores hold no NaN and no infinity but whole columns of -inf.

    Raises
    ------
    UserError
        Naming the file, the first bad row (its id where ids are known) and the column.
    """
    array = np.asarray(logits)
    names = list(map(str, range(array.shape[1]))) if classes is None else classes
    FiniteChecker(names, where, masked_columns(array)).check(array, ids)


def _row_name(start: int, row: int, ids: Sequence[str] | None) -> str:
    return f"row {start + row}" if ids is None else f"id {ids[row]} (row {start + row})"


def looks_like_probabilities(logits: Any, tolerance: float = 1e-3) -> bool:
    """Whether every row lies in [0, 1] and sums to one within ``tolerance``: probabilities, not logits.

    False for no rows and for fewer than two columns.
    """
    array = np.asarray(logits)
    if array.ndim != 2 or len(array) == 0 or array.shape[1] < 2:
        return False
    for part in (array[:256], array):  # most logits are told apart by a few rows
        if not (part.min() >= -1e-6 and part.max() <= 1 + tolerance):  # also false for NaN
            return False
        if not np.all(np.abs(part.sum(axis=1, dtype=np.float64) - 1) <= tolerance):
            return False
    return True


def probability_warning(where: str | Path | None) -> str:
    """The sentence for scores that look like probabilities but were given as logits."""
    place = f" in {where}" if where is not None else ""
    return f"the scores{place} look like probabilities (rows sum to 1), not logits; say --input prob to take their log"


def to_log(
    probabilities: NDArray[Any], where: str | Path | None = None, start: int = 0
) -> tuple[NDArray[np.float64], int]:
    """Natural logarithm of probabilities with the floor 1e-30, and how many exact zeros there were.

    Parameters
    ----------
    probabilities : ndarray
        (N, K) in [0, 1]; NaN is passed on.
    where, start
        File and number of the first row, for messages.

    Raises
    ------
    UserError
        A value outside [0, 1], named by row and column.
    """
    outside = (probabilities < 0) | (probabilities > 1 + 1e-3)
    if outside.any():
        row, column = (int(v[0]) for v in np.nonzero(outside))
        given = f"{probabilities[row, column]:g} at row {start + row}, column {column}"
        raise UserError("not a probability", where=where, given=given, remedy="use --input logit or --input logprob")
    return np.log(np.maximum(probabilities.astype(np.float64), PROBABILITY_FLOOR)), int((probabilities == 0).sum())


def column_order(
    have: Sequence[str], want: Sequence[str], *, where: str | Path | None = None, against: str | Path | None = None
) -> NDArray[np.intp] | None:
    """Columns of ``have`` in the order of ``want``, compared by name.

    Parameters
    ----------
    have, want
        Class names of the two files. Names ``0..K-1`` in order mean that a file has no names.
    where, against
        The two files, for messages.

    Returns
    -------
    ndarray of intp or None
        ``order`` with ``have[order[j]] == want[j]``; None when the orders agree.

    Raises
    ------
    UserError
        Named classes that differ, or a different number of columns where names are missing.
    """
    have, want = list(map(str, have)), list(map(str, want))
    if have == want:
        return None
    other = f"{len(want)} in {against}" if against is not None else f"{len(want)} expected"
    if not (_named(have) and _named(want)):
        if len(have) != len(want):
            raise UserError(
                "different numbers of classes, and no class names to match them by",
                where=where,
                given=f"{len(have)} columns, {other}",
                remedy="store the class names in both files",
            )
        bare = against if _named(have) else where
        log.warning("class names are missing in %s: columns taken in order", bare or "one of two class lists")
        return None
    place = {name: i for i, name in enumerate(have)}
    missing = [name for name in want if name not in place]
    extra = sorted(set(have) - set(want))
    if missing or extra:
        parts = [f"{kind} {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                 for kind, names in (("missing", missing), ("unexpected", extra)) if names]  # fmt: skip
        raise UserError(
            "the classes differ" + (f" from those of {against}" if against is not None else ""),
            where=where,
            given="; ".join(parts),
            remedy="give files of the same classes (any order)",
        )
    return np.array([place[name] for name in want], dtype=np.intp)


def _named(classes: Sequence[str]) -> bool:
    return any(name != str(i) for i, name in enumerate(classes))


class IdCollector:
    """Remembers which ids were seen as 8-byte digests, so that files of any length can be compared."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.uint64]] = []

    def add(self, ids: Iterable[str] | None) -> None:
        """Add the ids of a piece; None for a file without ids."""
        if ids is None:
            return
        digests = b"".join(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest() for name in ids)
        self._parts.append(np.frombuffer(digests, dtype=np.uint64))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return any(len(part) for part in self._parts)

    @property
    def digests(self) -> NDArray[np.uint64]:
        """Sorted distinct digests."""
        return np.unique(np.concatenate(self._parts)) if self._parts else np.empty(0, dtype=np.uint64)

    def shared(self, other: IdCollector) -> int:
        """How many distinct ids are in both."""
        return len(np.intersect1d(self.digests, other.digests, assume_unique=True))


def warn_duplicates(
    first: IdCollector | Sequence[str] | None, second: IdCollector | Sequence[str] | None, names: tuple[str, str]
) -> int:
    """Warn of samples that are in two data sets which must not share any; return their number.

    Parameters
    ----------
    first, second
        Ids, or collectors of them.
    names
        What the two sets are called, such as ``("train.npz", "test.npz")``.
    """
    a, b = (x if isinstance(x, IdCollector) else _collected(x) for x in (first, second))
    count = a.shared(b)
    if count:
        log.warning("%d ids are in both %s and %s: the result is measured on data that chose it (leak)", count, *names)
    return count


def _collected(ids: Sequence[str] | None) -> IdCollector:
    collector = IdCollector()
    collector.add(ids)
    return collector

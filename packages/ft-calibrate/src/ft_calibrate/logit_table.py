"""A table of scores with labels, class names and ids: `LogitTable`; writing it, and bringing tables into one order.

A table's scores are always on the log scale: logits, log-probabilities, or probabilities whose logarithm was taken
while reading (constants per row cancel in every method of this package, so the three are interchangeable).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

from ft_calibrate.inputs import INPUT_KINDS, InputKind
from ft_calibrate.table_checks import column_order

__all__ = ["LogitTable", "align", "chunk_rows", "file_sha256", "moved_labels", "write_table"]

CHUNK_NUMBERS = 2**22  # scores per piece when the caller does not say: 16 MB of float32


def chunk_rows(num_classes: int) -> int:
    """Rows per piece that make about 16 MB of scores."""
    return max(1, CHUNK_NUMBERS // max(num_classes, 1))


@dataclass
class LogitTable:
    """N samples scored on K classes.

    Parameters
    ----------
    logits : ndarray
        (N, K) float32 or float64 on the log scale; may be a memory map. A column of -inf is a masked class.
    classes : list of str
        Names of the K columns; ``"0"`` .. ``"K-1"`` where there are none.
    labels : ndarray of int64, optional
        (N,) columns, -1 where unknown.
    features : ndarray, optional
        (N, D).
    ids : list of str, optional
        One per sample.
    path : Path, optional
        The file that the table was read from.
    kind : {"logit", "logprob", "prob"}
        What the file held. For ``"prob"`` the logarithm has been taken.

    Raises
    ------
    UserError
        Shapes that do not fit each other, labels that are no column, class names that repeat.
    """

    logits: NDArray[Any]
    classes: list[str] = field(default_factory=list)
    labels: NDArray[np.int64] | None = None
    features: NDArray[Any] | None = None
    ids: list[str] | None = None
    path: Path | None = None
    kind: InputKind = "logit"

    def __post_init__(self) -> None:
        if self.logits.ndim != 2:
            raise UserError("scores must be (N, K)", where=self.path, given=f"shape {self.logits.shape}")
        n, k = self.logits.shape
        self.classes = list(map(str, self.classes)) if len(self.classes) else list(map(str, range(k)))
        if len(self.classes) != k:
            given = f"{len(self.classes)} names for {k} columns"
            raise UserError("class names do not fit the scores", where=self.path, given=given)
        if len(set(self.classes)) < k:
            repeated = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise UserError("class names repeat", where=self.path, given=", ".join(repeated[:8]))
        for name in ("labels", "features", "ids"):
            values = getattr(self, name)
            if values is not None and len(values) != n:
                raise UserError(f"{name} of another length", where=self.path, given=f"{len(values)} for {n} rows")
        if self.kind not in INPUT_KINDS:
            raise UserError("unknown kind of scores", where=self.path, given=self.kind, remedy=", ".join(INPUT_KINDS))
        if self.labels is not None:
            self.labels = np.asarray(self.labels, dtype=np.int64)
            if n and not (self.labels.min() >= -1 and self.labels.max() < k):
                given = f"{self.labels.min()}..{self.labels.max()} for {k} columns"
                raise UserError("labels that are no column", where=self.path, given=given)

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits.shape[1]

    @property
    def named(self) -> bool:
        """Whether the classes have names other than their numbers."""
        return any(name != str(i) for i, name in enumerate(self.classes))

    def subset(self, rows: Any) -> LogitTable:
        """The table of some rows: a slice, a boolean mask (N,) or row numbers."""
        ids = None
        if self.ids is not None:
            ids = self.ids[rows] if isinstance(rows, slice) else [self.ids[i] for i in np.arange(len(self))[rows]]
        return dataclasses.replace(
            self,
            logits=self.logits[rows],
            labels=None if self.labels is None else self.labels[rows],
            features=None if self.features is None else self.features[rows],
            ids=ids,
        )

    def reordered(self, classes: Sequence[str]) -> LogitTable:
        """The table with its columns in the order of ``classes``, matched by name; labels follow.

        Raises
        ------
        UserError
            Classes that differ, or numbers of columns that differ where names are missing.
        """
        order = column_order(self.classes, classes, where=self.path)
        if order is None:
            return dataclasses.replace(self, classes=list(map(str, classes)))
        labels = None if self.labels is None else moved_labels(self.labels, order)
        return dataclasses.replace(self, logits=self.logits[:, order], labels=labels, classes=list(map(str, classes)))

    def chunks(self, rows: int | None = None) -> Iterator[LogitTable]:
        """Consecutive tables of at most ``rows`` rows; default: about 16 MB of scores each."""
        step = rows or chunk_rows(self.num_classes)
        for start in range(0, len(self), step):
            yield self.subset(slice(start, start + step))


def moved_labels(labels: NDArray[np.int64], order: NDArray[np.intp]) -> NDArray[np.int64]:
    """Labels (columns, -1 unknown) after the columns were put into ``order``: column j is the old ``order[j]``."""
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return np.where(labels < 0, -1, place[labels])


def write_table(table: LogitTable, path: str | Path) -> Path:
    """Write a table whole or not at all; the suffix chooses the format.

    ``.npz`` (stored uncompressed, so that it can be mapped), ``.csv``, ``.tsv``, ``.parquet``, ``.feather``, ``.pt``,
    ``.safetensors``. Class names, ids, features and the kind go with it; scores keep every digit.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    UserError
        An unknown suffix.
    """
    from ft_calibrate.table_writing import write

    return write(table, Path(path))


def align(tables: Sequence[LogitTable]) -> list[LogitTable]:
    """Bring the columns of all tables into the order of the first, by class name.

    Raises
    ------
    UserError
        Classes that differ, or numbers of columns that differ where names are missing.
    """
    named = next((t for t in tables if t.named), tables[0])
    return [table.reordered(named.classes) for table in tables]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's files with their names, in hex."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{part.relative_to(path).as_posix()}\0{file_sha256(part)}\0".encode())
    return total.hexdigest()

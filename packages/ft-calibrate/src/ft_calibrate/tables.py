"""Reading score files: whole (`read_table`) or in pieces (`iter_chunks`, `open_table`), checked on the way.

Formats are in `ft_calibrate.table_formats`, the table itself is `LogitTable`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

from ft_calibrate.groups import label_columns
from ft_calibrate.inputs import INPUT_KINDS, InputKind, looks_like_probabilities
from ft_calibrate.logit_table import LogitTable, align, chunk_rows, file_sha256, moved_labels, write_table
from ft_calibrate.table_checks import (
    FiniteChecker,
    check_finite,
    column_order,
    probability_warning,
    to_log,
)
from ft_calibrate.table_formats import Source, TableOptions, open_source, texts

__all__ = [
    "LogitTable",
    "TableFile",
    "align",
    "check_finite",
    "file_sha256",
    "iter_chunks",
    "open_table",
    "read_table",
    "write_table",
]

log = logging.getLogger(__name__)


class TableFile:
    """A score file that is read in pieces, any number of times. Made by `open_table`.

    Attributes
    ----------
    path : Path
    classes : list of str
        Names of the K columns, in the order in which they are handed out.
    kind : str
        What the file holds: ``"logit"``, ``"logprob"`` or ``"prob"``.
    rows, dropped, zeros : int
        Rows handed out, rows dropped (``nan="drop"``) and exact zeros among probabilities, of the last full reading.
    looks_like_probabilities : bool
        Whether the file was read as logits but every row sums to one; known after a full reading.
    refuse_probabilities : bool
        Whether such scores are an error (else a warning); default: when neither ``kind`` nor the file says what it is.
    progress : callable, optional
        ``progress(pieces, total)`` is iterated in place of the pieces by every reading; for a progress bar.
    """

    def __init__(
        self, source: Source, *, kind: InputKind | None = None, nan: str = "error", classes: Sequence[str] | None = None
    ) -> None:
        if nan not in ("error", "drop"):
            raise UserError("unknown treatment of NaN", where="--nan", given=nan, remedy="use error or drop")
        if kind is not None and kind not in INPUT_KINDS:
            raise UserError(
                "unknown kind of scores", where="--input", given=kind, remedy=f"use {', '.join(INPUT_KINDS)}"
            )
        self.path, self._source, self._nan = source.path, source, nan
        stored = source.kind if source.kind in INPUT_KINDS else "logit"
        self.kind: InputKind = kind or stored
        names = list(map(str, range(source.num_columns))) if source.classes is None else source.classes
        LogitTable(np.empty((0, source.num_columns)), names, path=source.path)  # checks the names
        self._own, self._order = names, None
        if classes is not None:
            self._order = column_order(names, classes, where=source.path)
        self.classes = names if classes is None else list(map(str, classes))
        self.rows = self.dropped = self.zeros = 0
        self.looks_like_probabilities = False
        self.refuse_probabilities = kind is None and source.kind not in INPUT_KINDS
        self.progress: Callable[[Iterator[LogitTable], int | None], Iterable[LogitTable]] | None = None
        self._masked: NDArray[np.bool_] | None = None
        self._told = False

    def chunks(self, rows: int | None = None) -> Iterator[LogitTable]:
        """Read the file from the beginning as tables of at most ``rows`` rows (default about 16 MB of scores).

        Raises
        ------
        UserError
            Labels that are no class; NaN or infinities (unless they are to be dropped); no rows at all; after the last
            piece, that all rows are probabilities and not logits.
        """
        rows = rows or chunk_rows(len(self.classes))
        pieces = self._chunks(rows)
        if self.progress is None:
            yield from pieces
        else:
            n = self._source.num_rows
            yield from self.progress(pieces, None if n is None else -(-n // rows))

    def _chunks(self, rows: int) -> Iterator[LogitTable]:
        if self._nan == "drop" and self._masked is None:
            self._masked = self._scan_masked(rows)
        checker = FiniteChecker(self._own, self.path, self._masked)
        count = dropped = zeros = 0
        alike = self.kind == "logit"
        for block in self._source.blocks(rows):
            logits = _floats(block.logits, self.path)
            if self.kind == "prob":
                logits, more = to_log(logits, self.path, count + dropped)
                zeros += more
            elif self.kind == "logprob":
                _check_logprob(logits, self.path, count + dropped)
            alike = alike and looks_like_probabilities(logits)
            table = LogitTable(logits, self._own, None, block.features, block.ids, self.path, self.kind)
            if self._nan == "drop":
                bad = checker.bad_rows(logits)
                dropped += int(bad.sum())
                table = table.subset(~bad) if bad.any() else table
                labels: Any = None if block.labels is None else np.asarray(block.labels)[~bad]
            else:
                checker.check(logits, block.ids)
                labels = block.labels
            table.labels = None if labels is None else _columns_of(labels, self._own, self.path)
            if self._order is not None:
                table = table.reordered(self.classes)
            table.classes = self.classes
            count += len(table)
            if len(table):
                yield table
        if count == 0:
            given = f"all {dropped} dropped" if dropped else "0"
            raise UserError("no rows", where=self.path, given=given, remedy="give a file with samples")
        self.rows, self.dropped, self.zeros, self.looks_like_probabilities = count, dropped, zeros, alike
        self._tell()

    def labels(self) -> NDArray[np.int64] | None:
        """Labels (N,) of all rows as columns of `classes`, without reading the scores where the format allows it.

        None for a file without labels. Rows that are dropped do not count.
        """
        if self._nan == "drop":
            found = [table.labels for table in self.chunks()]
            return None if found[0] is None else np.concatenate([v for v in found if v is not None])
        parts = []
        for values in self._source.labels(chunk_rows(len(self.classes))):
            if values is None:
                return None
            parts.append(_columns_of(values, self._own, self.path))
        if not parts:
            raise UserError("no rows", where=self.path, given="0", remedy="give a file with samples")
        labels = np.concatenate(parts)
        return labels if self._order is None else moved_labels(labels, self._order)

    def read(self) -> LogitTable:
        """Read all rows; memory maps stay maps where nothing has to be changed.

        Raises
        ------
        UserError
            As `chunks`.
        """
        whole = self._source.whole()
        if whole is None or self.kind == "prob" or self._nan == "drop" or whole.logits.dtype.kind != "f":
            return _joined(list(self.chunks()))
        parts = [table.labels for table in self.chunks()]  # also checks every score
        labels = np.concatenate([p for p in parts if p is not None]) if whole.labels is not None else None
        logits = whole.logits if self._order is None else whole.logits[:, self._order]
        logits = logits.astype(np.float32) if logits.dtype == np.float16 else logits
        return LogitTable(logits, self.classes, labels, whole.features, whole.ids, self.path, self.kind)

    def _scan_masked(self, rows: int) -> NDArray[np.bool_]:
        """Columns that are -inf in every row that is not to be dropped anyway; one more reading of the file."""
        masked = np.ones(len(self._own), dtype=bool)
        any_rows = False
        for block in self._source.blocks(rows):
            logits = np.asarray(block.logits, dtype=float)
            good = ~(np.isnan(logits) | np.isposinf(logits)).any(axis=1)
            any_rows |= bool(good.any())
            masked &= np.isneginf(logits[good]).all(axis=0)
        return masked if any_rows else np.zeros_like(masked)

    def _tell(self) -> None:
        """Log what a reader should know, once."""
        if self.looks_like_probabilities and self.refuse_probabilities:
            raise UserError(
                "the scores look like probabilities (rows sum to 1), not logits",
                where=self.path,
                remedy="say --input prob to take their log (--input logit if they are logits all the same)",
            )
        if self._told:
            return
        self._told = True
        if self.looks_like_probabilities:
            log.warning("%s", probability_warning(self.path))
        if self.dropped:
            log.warning("%d of %d rows dropped from %s (NaN or inf)", self.dropped, self.rows + self.dropped, self.path)
        if self.zeros:
            log.warning("%d probabilities in %s are exactly zero; the floor 1e-30 stands in", self.zeros, self.path)


def _check_logprob(logits: NDArray[Any], path: Path, start: int) -> None:
    high = logits > 1e-3
    if high.any():
        row, column = (int(v[0]) for v in np.nonzero(high))
        given = f"{logits[row, column]:g} at row {start + row}, column {column}"
        raise UserError(
            "not a log-probability", where=path, given=given, remedy="they are at most 0: say --input logit"
        )


def _floats(values: NDArray[Any], path: Path | None) -> NDArray[Any]:
    """Scores as float32 or float64, (n, K)."""
    if values.ndim != 2:
        raise UserError("scores must be (N, K)", where=path, given=f"shape {values.shape}")
    if values.dtype.kind not in "fiu":
        raise UserError("scores are no numbers", where=path, given=str(values.dtype))
    if values.dtype in (np.float32, np.float64):
        return values
    return values.astype(np.float32 if values.dtype == np.float16 else np.float64)


def _columns_of(labels: Any, classes: list[str], path: Path | None) -> NDArray[np.int64]:
    """Columns of labels as a file holds them.

    Where every class is named by a number (ILSVRC indices, say), a numeric label is such a name and never a position:
    ``[341, 245]`` with the classes ``["245", "341"]`` are the columns 1 and 0.
    """
    where = f"labels of {path}" if path is not None else "labels"
    array = np.asarray(labels) if not isinstance(labels, np.ndarray) else labels
    if array.dtype.kind == "S":
        array = np.array(texts(array))
    by_number = all(name.isdecimal() for name in classes) and any(name != str(i) for i, name in enumerate(classes))
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), -1, array)
        broken = array[(array != np.round(array)) | np.isinf(array)]
        if len(broken):
            raise UserError("labels are no whole numbers", where=where, given=str(broken[0]))
        array = array.astype(np.int64)
    if by_number:
        known = set(classes)
        _tell_ambiguous(array, classes, where)
        items = ["" if str(v) in ("-1", "None", "nan") else str(v).strip() for v in array.tolist()]
        unknown = sorted({v for v in items if v and v not in known})
        if unknown:
            raise UserError(
                "labels that are not among the classes",
                where=where,
                given=", ".join(unknown[:8]),
                remedy=f"the classes are named {', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}, and a "
                "number is such a name, not a column number: store the names",
            )
        return label_columns(items, classes, where=where)
    return label_columns(array if array.dtype.kind in "iu" else array.tolist(), classes, where=where)


def _tell_ambiguous(labels: NDArray[Any], classes: list[str], where: str) -> None:
    """Warn where whole numbers are names of classes and could as well be numbers of other columns."""
    if labels.dtype.kind not in "iu":
        return
    place = {name: i for i, name in enumerate(classes)}
    values = [v for v in np.unique(labels).tolist() if v >= 0]
    if all(v < len(classes) and str(v) in place for v in values) and any(place[str(v)] != v for v in values):
        example = next(v for v in values if place[str(v)] != v)
        log.warning(
            "%s: whole numbers are read as the names of classes (%d is the class named '%d', column %d), not as column "
            "numbers; store labels as texts, the class names, to leave no doubt",
            where, example, example, place[str(example)],
        )  # fmt: skip


def _joined(parts: Sequence[LogitTable]) -> LogitTable:
    first = parts[0]

    def join(name: str) -> Any:
        values = [getattr(p, name) for p in parts]
        if any(v is None for v in values):
            return None
        return [v for part in values for v in part] if name == "ids" else np.concatenate(values)

    return LogitTable(
        join("logits"), first.classes, join("labels"), join("features"), join("ids"), first.path, first.kind
    )


def open_table(
    path: str | Path,
    *,
    input: InputKind | None = None,
    nan: str = "error",
    classes: Sequence[str] | None = None,
    options: TableOptions | None = None,
) -> TableFile:
    """Open a score file of any known format without reading its rows.

    Parameters
    ----------
    path
        File or folder (formats: `ft_calibrate.table_formats`).
    input : {"logit", "logprob", "prob"}, optional
        What the file holds; default: what it says itself, else logits. Of probabilities the logarithm is taken with
        the floor 1e-30.
    nan : {"error", "drop"}
        What becomes of rows with NaN or infinities.
    classes
        Hand the columns out in this order, matched by name.
    options
        Names of columns.

    Raises
    ------
    UserError
        See `ft_calibrate.table_formats.open_source`; classes that do not match ``classes``.
    """
    return TableFile(open_source(path, options), kind=input, nan=nan, classes=classes)


def read_table(
    path: str | Path,
    *,
    input: InputKind | None = None,
    nan: str = "error",
    classes: Sequence[str] | None = None,
    options: TableOptions | None = None,
) -> LogitTable:
    """Read a score file whole (uncompressed arrays stay memory maps). Parameters and errors: `open_table`."""
    return open_table(path, input=input, nan=nan, classes=classes, options=options).read()


def iter_chunks(path: str | Path, rows: int | None = None, **how: Any) -> Iterator[LogitTable]:
    """Read a score file in tables of at most ``rows`` rows, in bounded memory. Other parameters: `open_table`."""
    return open_table(path, **how).chunks(rows)

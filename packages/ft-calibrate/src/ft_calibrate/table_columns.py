"""Row-wise files: csv, parquet, feather and saved HF datasets, read in pieces."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

from ft_calibrate.table_formats import (
    Block,
    Picked,
    TableOptions,
    names_from_json,
    pick_columns,
    texts,
)

__all__ = ["METADATA_KEY", "open_csv", "open_dataset", "open_feather", "open_parquet", "pyarrow_needed"]

METADATA_KEY = "ft_calibrate"
"""Prefix of our keys in the metadata of Arrow schemas: ``ft_calibrate.classes``, ``ft_calibrate.kind``."""


CELLS = 2**18  # of a csv file in memory at once


@dataclass
class CsvSource:
    """Comma- or tab-separated rows with a header, UTF-8, quotes as in RFC 4180."""

    path: Path
    picked: Picked
    header: list[str]
    delimiter: str
    kind: str | None = None
    num_rows: int | None = None  # counting lines is reading the file

    @property
    def classes(self) -> list[str] | None:
        """Class names from the header."""
        return self.picked.classes

    @property
    def num_columns(self) -> int:
        """K."""
        return len(self.picked.logits)

    def labels(self, rows: int) -> Iterator[Any]:
        """Labels; no number is parsed."""
        at = None if self.picked.label is None else self.header.index(self.picked.label)
        for lines, _ in self._lines(self._most()):
            yield None if at is None else [line[at] for line in lines]

    def whole(self) -> Block | None:
        """None: text is parsed in pieces."""
        return None

    def blocks(self, rows: int) -> Iterator[Block]:
        """Parse the file from the top; blank lines are skipped, an empty score is NaN."""
        place = {name: i for i, name in enumerate(self.header)}
        for lines, numbers in self._lines(min(rows, self._most())):
            yield self._block(lines, numbers, place)

    def _most(self) -> int:
        return max(1, CELLS // len(self.header))  # a cell of text takes far more memory than its number

    def _lines(self, rows: int) -> Iterator[tuple[list[list[str]], list[int]]]:
        """Cells of at most ``rows`` lines at a time, and the numbers of these lines in the file."""
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=self.delimiter)
            lines: list[list[str]] = []
            numbers: list[int] = []
            try:
                next(reader)
                for line in reader:
                    if not line:
                        continue
                    if len(line) != len(self.header):
                        raise UserError(
                            "row of another length",
                            where=f"{self.path}, line {reader.line_num}",
                            given=f"{len(line)} cells for {len(self.header)} columns",
                            remedy="mend the line (was the file cut off?)",
                        )
                    lines.append(line)
                    numbers.append(reader.line_num)
                    if len(lines) == rows:
                        yield lines, numbers
                        lines, numbers = [], []
            except (csv.Error, UnicodeDecodeError) as e:
                raise UserError("unreadable text", where=f"{self.path}, line {reader.line_num}", given=e) from e
            if lines:
                yield lines, numbers

    def _block(self, lines: list[list[str]], numbers: list[int], place: dict[str, int]) -> Block:
        def column(name: str) -> list[str]:
            return [line[place[name]] for line in lines]

        def matrix(names: tuple[str, ...]) -> NDArray[np.float64]:
            at = [place[name] for name in names]
            try:
                return np.array([[line[i] for i in at] for line in lines], dtype=np.float64)
            except ValueError:
                return np.array([[_number(line[i], self.path, n, self.header[i]) for i in at]
                                 for line, n in zip(lines, numbers)])  # fmt: skip

        p = self.picked
        return Block(
            matrix(p.logits),
            None if p.label is None else column(p.label),
            None if p.id is None else column(p.id),
            matrix(p.features).astype(np.float32) if p.features else None,
        )


def _number(cell: str, path: Path, line: int, column: str) -> float:
    try:
        return float(cell) if cell.strip() else np.nan
    except ValueError:
        where = f"{path}, line {line}, column {column}"
        raise UserError("not a number", where=where, given=repr(cell)) from None


def open_csv(path: Path, options: TableOptions) -> CsvSource:
    """Open a ``.csv`` (comma) or ``.tsv`` (tab) file."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=delimiter), None)
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError("not a text table", where=path, given=e, remedy="save it as UTF-8 csv") from e
    if not header:
        raise UserError("no header line", where=path, remedy="the first line must name the columns")
    return CsvSource(path, pick_columns(header, options, path), header, delimiter)


def pyarrow_needed(path: Path) -> Any:
    """The ``pyarrow`` module, or the sentence that tells how to get it."""
    try:
        import pyarrow
    except ImportError as e:
        remedy = 'pip install "ft-calibrate[parquet]", or use .npz or .csv'
        raise UserError("parquet and feather files need pyarrow", where=path, remedy=remedy) from e
    return pyarrow


class ArrowSource:
    """Record batches of an Arrow-backed file.

    Parameters
    ----------
    schema
        Of the file; its metadata may name the classes of a list column.
    batches : callable
        ``batches(columns, rows)`` yields record batches or tables of at most about ``rows`` rows, from the beginning.
    num_rows
        N, where it is known.
    names
        Class names that the file's own types give.
    """

    def __init__(
        self,
        path: Path,
        schema: Any,
        batches: Any,
        options: TableOptions,
        num_rows: int | None = None,
        names: list[str] | None = None,
    ) -> None:
        import pyarrow as pa

        def is_list(kind: Any) -> bool:
            return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)

        self.path, self._batches, self.num_rows = path, batches, num_rows
        lists = [f.name for f in schema if is_list(f.type)]
        self.picked = pick_columns(schema.names, options, path, lists)
        meta = {k.decode(): v for k, v in (schema.metadata or {}).items()}
        stored = names_from_json(meta.get(f"{METADATA_KEY}.classes"), path, "classes")
        kind = meta.get(f"{METADATA_KEY}.kind")
        self.kind = None if kind is None else kind.decode()
        if not self.picked.as_list:
            self.classes, self.num_columns = self.picked.classes, len(self.picked.logits)
            return
        first = next((b for b in batches(list(self.picked.logits), 1) if b.num_rows), None)
        if first is None:
            raise UserError("no rows", where=path, remedy="give a file with samples")
        self.num_columns = self._matrix(first, self.picked.logits, as_list=True).shape[1]
        known = stored or names
        self.classes = known if known is not None and len(known) == self.num_columns else None

    def labels(self, rows: int) -> Iterator[Any]:
        """Labels; no other column is read."""
        if self.picked.label is None:
            yield None
            return
        for batch in self._batches([self.picked.label], 2**18):
            if batch.num_rows:
                yield batch.column(self.picked.label).to_pylist()

    def whole(self) -> Block | None:
        """None: columns are turned into rows in pieces."""
        return None

    def blocks(self, rows: int) -> Iterator[Block]:
        """Rows in pieces of at most ``rows``."""
        for batch in self._batches(self.picked.names, rows):
            for start in range(0, batch.num_rows, rows):
                yield self._block(batch.slice(start, rows))

    def _block(self, batch: Any) -> Block:
        p = self.picked
        labels = None
        if p.label is not None:
            labels = batch.column(p.label).to_pylist()
        features = None
        if p.features:
            lists = len(p.features) == 1 and not p.features[0][-1:].isdecimal()
            features = self._matrix(batch, p.features, as_list=lists).astype(np.float32, copy=False)
        ids = None if p.id is None else texts(batch.column(p.id).to_pylist())
        return Block(self._matrix(batch, p.logits, as_list=p.as_list), labels, ids, features)

    def _matrix(self, batch: Any, names: tuple[str, ...], as_list: bool) -> NDArray[Any]:
        if as_list:
            return self._from_lists(batch, names[0])
        columns = []
        for name in names:
            column = batch.column(name)
            if hasattr(column, "combine_chunks"):
                column = column.combine_chunks()
            values = column.to_numpy(zero_copy_only=False)
            if values.dtype.kind not in "fiu":
                raise UserError("a score column holds no numbers", where=f"{self.path}, column {name}")
            columns.append(values)
        return np.stack(columns, axis=1) if columns else np.empty((batch.num_rows, 0))

    def _from_lists(self, batch: Any, name: str) -> NDArray[Any]:
        column = batch.column(name)
        if hasattr(column, "combine_chunks"):
            column = column.combine_chunks()
        if column.null_count:
            raise UserError("a row without scores", where=f"{self.path}, column {name}")
        import pyarrow.compute as pc

        flat = column.flatten().to_numpy(zero_copy_only=False)
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if len(lengths) and (lengths != lengths[0]).any():
            given = f"{int(lengths[0])} and {int(lengths[lengths != lengths[0]][0])} values"
            raise UserError("rows of different lengths", where=f"{self.path}, column {name}", given=given)
        return flat.reshape(len(column), -1) if len(column) else np.empty((0, 0))


def open_parquet(path: Path, options: TableOptions) -> ArrowSource:
    """Open a parquet file; one row group at a time is in memory."""
    pa = pyarrow_needed(path)
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as e:
        raise UserError("not a parquet file", where=path, given=e, remedy="write it again") from e

    def batches(columns: list[str], rows: int) -> Iterator[Any]:
        try:
            # One row group at a time and nothing read ahead: otherwise the buffers of all groups are kept to the end.
            for group in range(file.metadata.num_row_groups):
                with pq.ParquetFile(path, metadata=file.metadata, pre_buffer=False) as reader:
                    yield from reader.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
        except (pa.ArrowInvalid, OSError) as e:
            raise UserError("damaged parquet file", where=path, given=e, remedy="write it again") from e

    return ArrowSource(path, file.schema_arrow, batches, options, file.metadata.num_rows)


def open_feather(path: Path, options: TableOptions) -> ArrowSource:
    """Open a feather file (Arrow IPC): mapped, one record batch at a time."""
    pa = pyarrow_needed(path)
    import pyarrow.feather as feather

    try:
        with pa.memory_map(str(path)) as mapped:
            schema = pa.ipc.open_file(mapped).schema
    except pa.ArrowInvalid:
        try:
            table = feather.read_table(path)  # the first feather format has no batches
        except (pa.ArrowInvalid, OSError) as e:
            raise UserError("not a feather file", where=path, given=e, remedy="write it again") from e
        return ArrowSource(path, table.schema, lambda columns, rows: iter([table.select(columns)]), options, len(table))

    def batches(columns: list[str], rows: int) -> Iterator[Any]:
        with pa.memory_map(str(path)) as mapped:
            reader = pa.ipc.open_file(mapped)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i).select(columns)

    return ArrowSource(path, schema, batches, options)


def open_dataset(path: Path, options: TableOptions) -> ArrowSource:
    """Open a folder written by ``datasets.Dataset.save_to_disk``."""
    try:
        import datasets
    except ImportError as e:
        remedy = 'pip install "ft-calibrate[datasets]"'
        raise UserError("saved HF datasets need the datasets library", where=path, remedy=remedy) from e
    try:
        data = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, KeyError) as e:
        raise UserError("not a saved dataset", where=path, given=e, remedy="write it again with save_to_disk") from e
    if isinstance(data, datasets.DatasetDict):
        splits = list(data)
        split = options.split or (splits[0] if len(splits) == 1 else None)
        if split not in splits:
            given = repr(options.split) if options.split else f"splits {', '.join(splits)}"
            raise UserError("which split of the dataset?", where=path, given=given, remedy="give --split NAME")
        data = data[split]
    label = options.label_col or next((n for n in ("label", "labels") if n in data.column_names), None)
    feature = data.features.get(label) if label is not None else None
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    rows_of = data.with_format("arrow")

    def batches(columns: list[str], rows: int) -> Iterator[Any]:
        chosen = rows_of.select_columns(columns)
        for start in range(0, len(chosen), rows):
            yield chosen[start : start + rows]

    return ArrowSource(path, data.features.arrow_schema, batches, options, len(data), names)

"""Where scores come from: one small source per file format, all read in order and in pieces.

=================================  =====================================================================================
``.npz``                           arrays ``logits``, ``labels``, ``classes``, ``features``, ``ids``; members that are
                                   stored uncompressed are mapped into memory, compressed ones are streamed
``.npy`` or a folder of ``.npy``   ``logits`` alone, or ``logits.npy`` with the other names beside it; mapped
``.csv``, ``.tsv``                 columns ``logit_<class>``, ``label``, ``id``, ``feat_0`` ...
``.parquet``, ``.feather``         the same columns, or a list column ``logits``; by row group or record batch
``.pt``, ``.safetensors``          the keys of ``.npz``; in safetensors names stand in the metadata as JSON
folder of a saved HF dataset       as parquet; the names of a ``ClassLabel`` column name the classes
folder of shards                   files of one of these formats, joined in the order of their names
=================================  =====================================================================================

Pickled objects are never loaded.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

__all__ = ["PICKLE_REMEDY", "ArraySource", "Block", "Picked", "Source", "TableOptions", "open_source", "pick_columns"]

PICKLE_REMEDY = "extract the logits again, for example with `ft-calibrate extract`, and give the .npz or .parquet"
ALIASES = {"labels": ("labels", "label", "y"), "ids": ("ids", "id"), "features": ("features", "feats")}


@dataclass(frozen=True)
class TableOptions:
    """How the columns of a file are called.

    Parameters
    ----------
    logit_prefix
        Score columns are ``<prefix><class>``.
    logit_cols
        Explicit score columns, in class order; instead of the prefix.
    label_col, id_col
        Columns (or keys) of labels and ids.
    feature_prefix
        Feature columns are ``<prefix>0``, ``<prefix>1`` ...
    split
        Split of a saved HF dataset that has several.
    """

    logit_prefix: str = "logit_"
    logit_cols: tuple[str, ...] | None = None
    label_col: str | None = None
    id_col: str | None = None
    feature_prefix: str = "feat_"
    split: str | None = None


@dataclass
class Block:
    """Consecutive rows as the file holds them: scores (n, K), labels (n,) of any kind, ids, features (n, D)."""

    logits: NDArray[Any]
    labels: NDArray[Any] | list[Any] | None = None
    ids: list[str] | None = None
    features: NDArray[Any] | None = None


class Source(Protocol):
    """An opened file. ``classes`` is None where the file names none, ``kind`` where it does not say."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def classes(self) -> list[str] | None:
        """Class names, in column order."""

    @property
    def kind(self) -> str | None:
        """``"logit"``, ``"logprob"`` or ``"prob"``."""

    @property
    def num_columns(self) -> int:
        """K."""

    @property
    def num_rows(self) -> int | None:
        """N; None where only reading tells."""

    def blocks(self, rows: int) -> Iterator[Block]:
        """Read from the beginning, at most ``rows`` rows at a time."""

    def labels(self, rows: int) -> Iterator[Any]:
        """Only the labels, in pieces; None in their place for a file without labels."""

    def whole(self) -> Block | None:
        """All rows at once where that costs no memory (mapped files), else None."""


Read = Callable[[int, int], NDArray[Any]]


@dataclass
class Column:
    """One array of a file: rows ``start..stop-1`` by ``read``; ``mapped`` is the whole where it needs no memory."""

    shape: tuple[int, ...]
    read: Read
    mapped: NDArray[Any] | None = None

    @classmethod
    def of(cls, array: NDArray[Any]) -> Column:
        """Column of an array in memory or mapped."""
        return cls(array.shape, lambda start, stop: array[start:stop], array)


@dataclass
class ArraySource:
    """A file of whole arrays under the names ``logits``, ``labels``, ``ids``, ``features``."""

    path: Path
    columns: Mapping[str, Column]
    classes: list[str] | None
    kind: str | None = None

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            wanted = 2 if name in ("logits", "features") else 1
            if len(column.shape) != wanted:
                shape = {"logits": "(N, K)", "features": "(N, D)"}.get(name, "(N,)")
                raise UserError(f"{name} must be {shape}", where=self.path, given=f"shape {column.shape}")
        n = self.columns["logits"].shape[0]
        for name, column in self.columns.items():
            if column.shape[0] != n:
                given = f"{column.shape[0]} rows against {n} of logits"
                raise UserError(f"{name} of another length", where=self.path, given=given)

    @property
    def num_columns(self) -> int:
        """K."""
        return self.columns["logits"].shape[1]

    @property
    def num_rows(self) -> int:
        """N."""
        return self.columns["logits"].shape[0]

    def blocks(self, rows: int) -> Iterator[Block]:
        """Rows in pieces."""
        for start in range(0, self.num_rows, rows):
            yield self._rows(start, min(start + rows, self.num_rows))

    def labels(self, rows: int) -> Iterator[Any]:
        """Labels in one piece."""
        column = self.columns.get("labels")
        if self.num_rows:
            yield None if column is None else column.read(0, column.shape[0])

    def whole(self) -> Block | None:
        """All rows when the scores are mapped or in memory already."""
        if self.columns["logits"].mapped is None:
            return None
        found = {
            name: column.read(0, column.shape[0]) if column.mapped is None else column.mapped
            for name, column in self.columns.items()
        }
        return _block(found)

    def _rows(self, start: int, stop: int) -> Block:
        return _block({name: column.read(start, stop) for name, column in self.columns.items()})


def _block(found: Mapping[str, NDArray[Any]]) -> Block:
    ids = found.get("ids")
    return Block(found["logits"], found.get("labels"), None if ids is None else texts(ids), found.get("features"))


def texts(values: NDArray[Any] | Sequence[Any]) -> list[str]:
    """Names as str, whatever they are stored as."""
    items = values.tolist() if isinstance(values, np.ndarray) else values
    return [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in items]


def open_source(path: str | Path, options: TableOptions | None = None) -> Source:
    """Open a score file or folder of any known format.

    Raises
    ------
    UserError
        A missing or unreadable file, an unknown format, pickled objects, missing score columns.
    """
    from ft_calibrate import table_arrays, table_columns

    path, options = Path(path), options or TableOptions()
    if not path.exists():
        raise UserError("no such file", where=path, remedy="check the path")
    if path.is_dir():
        return _open_folder(path, options)
    suffix = path.suffix.lower()
    openers: dict[str, Callable[[Path, TableOptions], Source]] = {
        ".npz": table_arrays.open_npz,
        ".npy": table_arrays.open_npy,
        ".csv": table_columns.open_csv,
        ".tsv": table_columns.open_csv,
        ".parquet": table_columns.open_parquet,
        ".pq": table_columns.open_parquet,
        ".feather": table_columns.open_feather,
        ".arrow": table_columns.open_feather,
        ".pt": table_arrays.open_torch,
        ".pth": table_arrays.open_torch,
        ".safetensors": table_arrays.open_safetensors,
    }
    if suffix not in openers:
        if _is_pickle(path):
            raise UserError("a pickled Python object, which can run code when loaded", where=path, remedy=PICKLE_REMEDY)
        known = ", ".join(openers)
        raise UserError("unknown format of score file", where=path, remedy=f"known: {known}, folders of them")
    if path.stat().st_size == 0:
        raise UserError("empty file", where=path, remedy="write it again")
    return openers[suffix](path, options)


def _is_pickle(path: Path) -> bool:
    """Whether a file begins like a pickle (protocol 2 or later), or is torch's archive of one."""
    with path.open("rb") as file:
        head = file.read(2)
    if len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return True
    if path.suffix.lower() in (".pkl", ".pickle"):
        return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    return False


def _open_folder(path: Path, options: TableOptions) -> Source:
    from ft_calibrate import table_arrays, table_columns

    if (path / "logits.npy").exists():
        return table_arrays.open_npy_folder(path, options)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return table_columns.open_dataset(path, options)
    suffixes = (".npz", ".parquet", ".feather", ".csv", ".safetensors")
    for suffix in suffixes:
        files = sorted(f for f in path.glob(f"*{suffix}") if not f.name.startswith("."))
        if files:
            return ShardSource(path, [open_source(file, options) for file in files])
    remedy = f"expected logits.npy, a saved HF dataset, or shards ({', '.join(suffixes)})"
    raise UserError("no score files", where=path, remedy=remedy)


@dataclass
class ShardSource:
    """Several files of the same classes as one."""

    path: Path
    shards: list[Source]

    def __post_init__(self) -> None:
        first = self.shards[0]
        self.classes, self.kind, self.num_columns = first.classes, first.kind, first.num_columns
        for shard in self.shards[1:]:
            if shard.classes != first.classes or shard.num_columns != first.num_columns:
                raise UserError(
                    "shards of different classes",
                    where=shard.path,
                    given=f"{shard.num_columns} columns, {first.num_columns} in {first.path.name}",
                    remedy="shards must have the same classes in the same order",
                )

    @property
    def num_rows(self) -> int | None:
        """N."""
        counts = [shard.num_rows for shard in self.shards]
        return None if any(n is None for n in counts) else sum(n for n in counts if n is not None)

    def blocks(self, rows: int) -> Iterator[Block]:
        """Rows of the first shard, then of the next."""
        for shard in self.shards:
            yield from shard.blocks(rows)

    def labels(self, rows: int) -> Iterator[Any]:
        """Labels of the first shard, then of the next."""
        for shard in self.shards:
            yield from shard.labels(rows)

    def whole(self) -> Block | None:
        """None: shards are joined by reading them."""
        return None


@dataclass(frozen=True)
class Picked:
    """Columns of a row-wise table: score columns with their classes (or one list column), label, id, features."""

    logits: tuple[str, ...]
    classes: list[str] | None
    label: str | None
    id: str | None
    features: tuple[str, ...]
    as_list: bool = False

    @property
    def names(self) -> list[str]:
        """All columns to read."""
        return [*self.logits, *(n for n in (self.label, self.id) if n is not None), *self.features]


def pick_columns(names: Sequence[str], options: TableOptions, where: Path, lists: Sequence[str] = ()) -> Picked:
    """Choose the columns of a row-wise table by their names.

    Parameters
    ----------
    names
        All columns of the file; their order is the class order.
    lists
        Those that hold a list per row.

    Raises
    ------
    UserError
        No score column, or a named column that is not there.
    """
    repeated = sorted({name for name in names if list(names).count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise UserError("column names repeat", where=where, given=", ".join(repeated[:8]))
    label = _named_column(names, options.label_col, ALIASES["labels"][1::-1], "--label-col", where)
    row_id = _named_column(names, options.id_col, ALIASES["ids"][::-1], "--id-col", where)
    features: tuple[str, ...] = tuple(
        n for n in names if n.startswith(options.feature_prefix) and n[len(options.feature_prefix) :].isdecimal()
    )
    if not features:
        features = tuple(n for n in ALIASES["features"] if n in lists)[:1]
    prefix = options.logit_prefix
    if options.logit_cols is not None:
        missing = [n for n in options.logit_cols if n not in names]
        if missing:
            raise _no_column(", ".join(missing[:8]), "--logit-cols", names, where)
        logits = tuple(options.logit_cols)
    else:
        taken = {label, row_id, *features}
        logits = tuple(n for n in names if n.startswith(prefix) and n not in taken)
    if not logits and "logits" in lists:
        logits = ("logits",)
    if not logits:
        raise _no_column(f"{prefix}<class>", "--logit-prefix or --logit-cols", names, where)
    if len(logits) == 1 and logits[0] in lists:
        return Picked(logits, None, label, row_id, features, as_list=True)
    strip = bool(prefix) and all(n.startswith(prefix) for n in logits)
    return Picked(logits, [n[len(prefix) :] if strip else n for n in logits], label, row_id, features)


def _named_column(
    names: Sequence[str], asked: str | None, defaults: Sequence[str], option: str, where: Path
) -> str | None:
    if asked is not None:
        if asked not in names:
            raise _no_column(asked, option, names, where)
        return asked
    return next((n for n in defaults if n in names), None)


def _no_column(name: str, option: str, names: Sequence[str], where: Path) -> UserError:
    shown = ", ".join(map(str, names[:12])) + (", ..." if len(names) > 12 else "")
    return UserError(f"no column {name}", where=where, given=f"columns are {shown}", remedy=f"see {option}")


def names_from_json(text: str | bytes | None, where: Path, field: str) -> list[str] | None:
    """A JSON list of names, as kept in file metadata."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list):
        raise UserError("metadata is no JSON list", where=f"{where}, {field}", given=repr(text)[:80])
    return [str(v) for v in value]

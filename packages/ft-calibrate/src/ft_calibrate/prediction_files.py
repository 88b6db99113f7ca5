"""Predictions written row by row: parquet, feather, csv, tsv or npz, whole or absent.

Every file says which gamma made it: in the schema's metadata (parquet, feather), in the array ``metadata`` (npz), or in
a file ``<name>.meta.json`` beside it (csv, tsv).
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from vfm_core.errors import UserError
from vfm_core.files import atomic_write, jsonable, write_json

from ft_calibrate.table_columns import METADATA_KEY, pyarrow_needed

__all__ = ["SUFFIXES", "check_suffix", "prediction_writer", "read_predictions"]

SUFFIXES = (".parquet", ".feather", ".csv", ".tsv", ".npz")

Columns = Mapping[str, Any]
Write = Callable[[Columns], None]


def check_suffix(path: Path) -> None:
    """Refuse a file of predictions whose format is unknown, before any work is done."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError("unknown format of predictions", where=path, remedy=f"use {', '.join(SUFFIXES)}")
    if path.suffix.lower() in (".parquet", ".feather"):
        pyarrow_needed(path)


@contextlib.contextmanager
def prediction_writer(path: Path, metadata: Mapping[str, Any]) -> Iterator[Write]:
    """Give a function that appends columns (lists or arrays of one length); the file appears when all went well.

    Parameters
    ----------
    path
        One of `SUFFIXES`. All but ``.npz`` are written piece by piece; for ``.npz`` the columns of all rows (not the
        scores they come from) wait in memory until the end, since an array's length stands before its values.
    metadata
        JSON-ready facts that are stored with the predictions.
    """
    check_suffix(path)
    facts = jsonable(metadata)
    openers = {".parquet": _arrow, ".feather": _arrow, ".npz": _npz}
    with atomic_write(path) as temporary, openers.get(path.suffix.lower(), _csv)(temporary, facts) as write:
        yield write
    if path.suffix.lower() in (".csv", ".tsv"):
        write_json(_sidecar(path), facts)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


@contextlib.contextmanager
def _csv(path: Path, metadata: Any) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", lineterminator="\n")
        begun = False

        def write(columns: Columns) -> None:
            nonlocal begun
            if not begun:
                writer.writerow(columns)
                begun = True
            lists = [v.tolist() if isinstance(v, np.ndarray) else v for v in columns.values()]
            writer.writerows(zip(*lists))

        yield write


@contextlib.contextmanager
def _npz(path: Path, metadata: Any) -> Iterator[Write]:
    parts: list[dict[str, Any]] = []
    yield lambda columns: parts.append({name: np.asarray(values) for name, values in columns.items()})
    arrays = {name: np.concatenate([p[name] for p in parts]) for name in (parts[0] if parts else ())}
    for name, values in arrays.items():
        if values.dtype.kind == "O":  # a column with gaps
            arrays[name] = np.array(["" if v is None else str(v) for v in values])
    with path.open("wb") as file:
        np.savez(file, **(arrays | {"metadata": np.array([json.dumps(metadata)])}))  # type: ignore[arg-type]


@contextlib.contextmanager
def _arrow(path: Path, metadata: Any) -> Iterator[Write]:
    pa = pyarrow_needed(path)
    import pyarrow.parquet as pq

    kinds = {
        "correct": pa.bool_(),
        "confidence": pa.float32(),
        "margin": pa.float32(),
        "seen_minus_absent": pa.float32(),
    }
    with contextlib.ExitStack() as stack:
        out: Any = None

        def write(columns: Columns) -> None:
            nonlocal out
            table = pa.table({n: pa.array(v, kinds.get(n, pa.string())) for n, v in columns.items()})
            table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
            if out is None:
                if path.suffix.lower() == ".parquet":
                    out = stack.enter_context(pq.ParquetWriter(path, table.schema))
                else:
                    sink = stack.enter_context(pa.OSFile(str(path), "wb"))
                    out = stack.enter_context(pa.ipc.new_file(sink, table.schema))
            out.write_table(table)

        yield write


def read_predictions(path: str | Path) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Read a file of predictions back.

    Returns
    -------
    columns, metadata : dict, dict
        Columns as lists (texts in csv and tsv), and what was stored about gamma.
    """
    path = Path(path)
    check_suffix(path)
    if not path.exists():
        raise UserError("no such file", where=path, remedy="check the path")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8", newline="") as file:
            header, *lines = list(csv.reader(file, delimiter="\t" if suffix == ".tsv" else ","))
        facts = json.loads(_sidecar(path).read_text(encoding="utf-8"))
        return {name: list(values) for name, values in zip(header, zip(*lines))}, facts
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            columns = {name: stored[name].tolist() for name in stored.files if name != "metadata"}
            return columns, json.loads(str(stored["metadata"][0]))
    pyarrow_needed(path)
    import pyarrow.feather as feather
    import pyarrow.parquet as pq

    table = pq.read_table(path) if suffix == ".parquet" else feather.read_table(path, memory_map=False)
    return table.to_pydict(), json.loads(table.schema.metadata[METADATA_KEY.encode()])

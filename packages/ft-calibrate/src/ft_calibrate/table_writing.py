"""Writing score tables: one writer per suffix, each file whole or absent."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vfm_core.errors import UserError
from vfm_core.files import atomic_write

from ft_calibrate.table_columns import METADATA_KEY, pyarrow_needed

if TYPE_CHECKING:
    from ft_calibrate.tables import LogitTable

__all__ = ["write"]


def write(table: LogitTable, path: Path) -> Path:
    """Write ``table`` in the format that the suffix names. See `ft_calibrate.tables.write_table`."""
    writers: dict[str, Callable[[LogitTable, Path], None]] = {
        ".npz": _npz,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _arrow,
        ".feather": _arrow,
        ".pt": _torch,
        ".safetensors": _safetensors,
    }
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise UserError("unknown format of score file", where=path, remedy=f"use one of {', '.join(writers)}")
    with atomic_write(path) as temporary:
        writer(table, temporary)
    return path


def _kind(table: LogitTable) -> str:
    return "logprob" if table.kind == "prob" else table.kind  # the logarithm has been taken


def _label_names(table: LogitTable) -> list[str]:
    assert table.labels is not None
    return ["" if column < 0 else table.classes[column] for column in table.labels.tolist()]


def _labels(table: LogitTable) -> np.ndarray[Any, Any]:
    """Column numbers; names where all classes are named by other numbers, because numbers would be read as names."""
    assert table.labels is not None
    if table.named and all(name.isdecimal() for name in table.classes):
        return np.array(_label_names(table), dtype=str)
    return table.labels


def _arrays(table: LogitTable) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {"logits": table.logits, "classes": np.array(table.classes, dtype=str), "kind": np.array([_kind(table)])}
    if table.labels is not None:
        arrays["labels"] = _labels(table)
    if table.features is not None:
        arrays["features"] = table.features
    if table.ids is not None:
        arrays["ids"] = np.array(table.ids, dtype=str)
    return arrays


def _npz(table: LogitTable, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **_arrays(table))  # type: ignore[arg-type]  # not compressed: can be mapped


def _torch(table: LogitTable, path: Path) -> None:
    import torch

    content: dict[str, Any] = {
        name: array.tolist() if array.dtype.kind == "U" else torch.from_numpy(np.array(array))
        for name, array in _arrays(table).items()
    } | {"kind": _kind(table)}
    torch.save(content, path)


def _safetensors(table: LogitTable, path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = _arrays(table)
    numbers = {name: np.ascontiguousarray(a) for name, a in arrays.items() if a.dtype.kind != "U"}
    meta = {name: json.dumps(a.tolist(), ensure_ascii=False) for name, a in arrays.items() if a.dtype.kind == "U"}
    save_file(numbers, path, metadata={**meta, "kind": _kind(table)})


def _csv(table: LogitTable, path: Path) -> None:
    features = 0 if table.features is None else table.features.shape[1]
    head = [f"logit_{name}" for name in table.classes] + [f"feat_{j}" for j in range(features)]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(
            [*(["id"] if table.ids is not None else []), *(["label"] if table.labels is not None else []), *head]
        )
        for part in table.chunks():
            names = None if part.labels is None else _label_names(part)
            numbers = part.logits.astype(np.float64)  # all digits of a float32, so that nothing is rounded
            if part.features is not None:
                numbers = np.concatenate([numbers, part.features.astype(np.float64)], axis=1)
            for i, row in enumerate(numbers.tolist()):
                start = ([part.ids[i]] if part.ids is not None else []) + ([names[i]] if names is not None else [])
                writer.writerow([*start, *row])


def _arrow(table: LogitTable, path: Path) -> None:
    pa = pyarrow_needed(path)
    import pyarrow.parquet as pq

    def batch(part: LogitTable) -> Any:
        columns: dict[str, Any] = {}
        if part.ids is not None:
            columns["id"] = pa.array(part.ids, pa.string())
        if part.labels is not None:
            columns["label"] = pa.array([name or None for name in _label_names(part)], pa.string())
        columns |= {f"logit_{name}": np.ascontiguousarray(part.logits[:, j]) for j, name in enumerate(part.classes)}
        if part.features is not None:
            columns |= {f"feat_{j}": np.ascontiguousarray(c) for j, c in enumerate(part.features.T)}
        made = pa.table(columns)
        meta = {f"{METADATA_KEY}.classes": json.dumps(part.classes), f"{METADATA_KEY}.kind": _kind(table)}
        return made.replace_schema_metadata(meta)

    schema = batch(table.subset(slice(0, 0))).schema
    if path.suffix.lower() == ".parquet":
        with pq.ParquetWriter(path, schema) as writer:
            for part in table.chunks():
                writer.write_table(batch(part))
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
            for part in table.chunks():
                out.write_table(batch(part))

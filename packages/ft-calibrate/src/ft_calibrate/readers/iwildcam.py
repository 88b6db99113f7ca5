"""``iwildcam:``: iWildCam as in WILDS 2.0 (Beery et al. 2020, Koh et al. 2021), and other tables of camera traps.

HT takes one camera (location) as the target domain; for FTC it is the data set where features do get worse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from vfm_core.data import ImageDataset, pick_splits
from vfm_core.data_sources import read_table
from vfm_core.errors import UserError, unknown_name
from vfm_core.specs import Spec

from ft_calibrate.readers import choose_rows, open_root

__all__ = ["COLUMNS", "open_iwildcam"]

COLUMNS = {"image": "filename", "label": "y", "split": "split", "camera": "location_remapped", "time": "datetime"}
"""Option -> column of WILDS' ``metadata.csv``."""

WAYS = ("published", "class", "time")
UNKNOWN = 99999
"""Label of pictures without one in WILDS."""

TRAIN_SHARE = 0.7
_Rows = list[tuple[int, dict[str, str]]]


def open_iwildcam(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``iwildcam:ROOT[@SPLIT][?location=N][&by=published|class|time][&images=FOLDER][&image=COLUMN...]``.

    ROOT (or ``ROOT/iwildcam_v2.0``) holds ``metadata.csv`` with the columns ``filename, y, split, location_remapped,
    datetime``, the pictures in ``train/``, and where present ``categories.csv`` with the columns ``y`` and ``name``.
    ROOT may also be the table itself, of any camera trap: name its columns by the options ``image``, ``label``,
    ``split``, ``camera`` and ``time``. Labels that are not whole numbers are class names.

    Parameters
    ----------
    spec : Spec
        ``location``: only this camera, or several joined by commas. ``by``: how ``@train`` and ``@test`` are meant:
        ``published``, the table's splits (train, val, test, id_val, id_test); ``class``, each class's pictures 7:3;
        ``time``, the first 70 % by time against the rest. The latter two split what the location leaves.
        ``images``: folder of the pictures, from ROOT.
    split : str, optional
        The same as ``@SPLIT``.

    Returns
    -------
    ImageDataset
        Classes are those of the whole table (182 in WILDS), so that cameras share columns. Meta: ``group`` (location),
        ``time``, ``split``.

    Raises
    ------
    UserError
        Missing file or column, unknown location, a label or time that cannot be read; with line and column.
    """
    root, split, options = open_root(spec, split, (*COLUMNS, "location", "by", "images"))
    by = options.get("by", "published")
    if by not in WAYS:
        raise unknown_name("way to split", by, WAYS, where="?by=")
    table = _table(root)
    columns = {key: options.get(key, name).lower() for key, name in COLUMNS.items()}
    needed = [key for key in COLUMNS if key in ("image", "label") or key in options]
    needed += [key for key, wanted in (("camera", "location" in options), ("time", by == "time")) if wanted]
    rows, present = read_table(table, ())
    for key in needed:
        if columns[key] not in present:
            remedy = f"name the column: ?{key}=COLUMN"
            given = ", ".join(present)[:200]
            raise UserError(f"no column {columns[key]!r}", where=f"{table}, line 1", given=given, remedy=remedy)
    classes, label_of = _classes(rows, columns["label"], table)
    chosen = _at(rows, columns["camera"], options.get("location"), table)
    if by == "published" and columns["split"] in present:
        parts = set(pick_splits({row[columns["split"]] for _, row in chosen}, split, table))
        chosen = [(line, row) for line, row in chosen if row[columns["split"]] in parts]
    else:
        labels = [label_of[row[columns["label"]]] for _, row in chosen]
        if by == "time":
            chosen = _by_time(chosen, columns["time"], split, table)
        elif by == "published" and split not in (None, "all"):
            remedy = "write ?by=class or ?by=time, or name the column: ?split=COLUMN"
            raise UserError(f"no column {columns['split']!r}", where=table, given=f"@{split}", remedy=remedy)
        else:
            chosen = [chosen[i] for i in choose_rows(labels, split, table, train=TRAIN_SHARE)]
    return _dataset(chosen, classes, label_of, columns, table, options, split)


def _table(root: Path) -> Path:
    if root.is_file():
        return root
    for place in (root, root / "iwildcam_v2.0"):
        if (place / "metadata.csv").is_file():
            return place / "metadata.csv"
    raise UserError("no metadata.csv", given=str(root), remedy="give WILDS' folder iwildcam_v2.0, or a table in CSV")


def _classes(rows: _Rows, column: str, table: Path) -> tuple[list[str], dict[str, int]]:
    """Class names and the label of every text in the label column; -1 for none and 99999."""
    texts = {row[column] for _, row in rows}
    values = texts - {"", str(UNKNOWN)}
    label_of = dict.fromkeys(texts - values, -1)
    if not all(value.isdecimal() for value in values):
        classes = sorted(values)
        return classes, label_of | {name: i for i, name in enumerate(classes)}
    categories = table.parent / "categories.csv"
    names: dict[int, str] = {}
    if categories.is_file():
        for line, row in read_table(categories, ("y", "name"))[0]:
            if not row["y"].isdecimal():
                remedy = "y is a whole number"
                raise UserError("not a class number", where=f"{categories}, line {line}", given=row["y"], remedy=remedy)
            if int(row["y"]) < UNKNOWN:
                names[int(row["y"])] = row["name"]
    size = max([int(value) for value in values] + list(names), default=-1) + 1
    if size > UNKNOWN:
        line = next(n for n, row in rows if row[column].isdecimal() and int(row[column]) > UNKNOWN)
        raise UserError("class number out of range", where=f"{table}, line {line}, column {column}", given=size - 1)
    spelled = [names.get(i) or str(i) for i in range(size)]
    count = Counter(spelled)
    classes = [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(spelled)]
    return classes, label_of | {value: int(value) for value in values}


def _at(rows: _Rows, column: str, wanted: str | None, table: Path) -> _Rows:
    if wanted is None:
        return rows
    there = Counter(row[column] for _, row in rows)
    places = [place.strip() for place in wanted.split(",") if place.strip()]
    for place in places:
        if place not in there:
            most = ", ".join(f"{name} ({n})" for name, n in there.most_common(3))
            remedy = f"the {len(there)} locations with the most pictures begin with {most}"
            raise UserError("unknown location", where=f"{table}, column {column}", given=repr(place), remedy=remedy)
    return [(line, row) for line, row in rows if row[column] in places]


def _by_time(rows: _Rows, column: str, split: str | None, table: Path) -> _Rows:
    if split in (None, "all"):
        return rows
    if split not in ("train", "test"):
        raise unknown_name("split", str(split), ["train", "test", "all"], where=table)
    times = []
    for line, row in rows:
        try:
            times.append(datetime.fromisoformat(row[column]).timestamp())
        except ValueError:
            remedy = "times are written like 2013-01-17 13:30:20"
            where = f"{table}, line {line}, column {column}"
            raise UserError("not a time", where=where, given=repr(row[column]), remedy=remedy) from None
    order = np.argsort(np.asarray(times), kind="stable")
    count = int(TRAIN_SHARE * len(rows))
    return [rows[i] for i in sorted((order[:count] if split == "train" else order[count:]).tolist())]


def _dataset(
    rows: _Rows,
    classes: list[str],
    label_of: Mapping[str, int],
    columns: Mapping[str, str],
    table: Path,
    options: Mapping[str, str],
    split: str | None,
) -> ImageDataset:
    if not rows:
        raise UserError("no pictures", where=table, remedy="check the split and ?location=")
    ids = []
    seen: set[str] = set()
    for line, row in rows:
        name = row[columns["image"]]
        if not name:
            where = f"{table}, line {line}, column {columns['image']}"
            raise UserError("empty file name", where=where, remedy="name the picture")
        ids.append(f"{name}#{line}" if name in seen else name)
        seen.add(name)
    names = [row[columns["image"]] for _, row in rows]
    folder = _images(table, options.get("images"), names)
    keys = (("group", columns["camera"]), ("time", columns["time"]), ("split", columns["split"]))
    meta: list[dict[str, Any]] = [{key: row[col] for key, col in keys if row.get(col)} for _, row in rows]
    title = table.parent.name if table.name == "metadata.csv" else table.stem
    title += f" location {options['location']}" if "location" in options else ""
    return ImageDataset(
        title + (f"@{split}" if split else ""),
        ids,
        [label_of[row[columns["label"]]] for _, row in rows],
        classes,
        files=[folder / name for name in names],
        meta=meta,
        sources=[table],
    )


def _images(table: Path, option: str | None, names: list[str]) -> Path:
    if option is not None:
        folder = next((f for f in (table.parent / option, Path(option).expanduser()) if f.is_dir()), None)
        if folder is None:
            raise UserError("no such folder of pictures", where="?images=", given=option, remedy="check the path")
        return folder
    for folder in (table.parent / "train", table.parent, table.parent / "images"):
        if any((folder / name).is_file() for name in names[:20]):
            return folder
    remedy = "name their folder: ?images=FOLDER"
    raise UserError("pictures of the table not found", where=table, given=names[0], remedy=remedy)

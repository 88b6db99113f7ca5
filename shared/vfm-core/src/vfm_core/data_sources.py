"""The data families that every command understands without a further library: image folders and CSV tables.

``folder:PATH``  ``PATH/class/*.jpg`` (also nested deeper), or ``PATH/{train,val,test}/class/*.jpg``, or pictures
                 without class folders. ``NNN.Name`` folders sort by their number and show without it.
``csv:PATH``     columns ``path,label[,split,group,time,reference,x0,y0,x1,y1,mask]``, paths relative to the table.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vfm_core.data import check_options, path_and_split, pick_splits
from vfm_core.dataset import ImageDataset
from vfm_core.errors import UserError, closest
from vfm_core.images import is_image_file
from vfm_core.specs import Spec

__all__ = ["display_names", "folder_dataset", "open_csv", "open_folder", "read_table"]

_log = logging.getLogger(__name__)
_SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}


# -------------------------------------------------------------------------------------------------------------- folder
def open_folder(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``folder:PATH[@SPLIT]``; see :func:`folder_dataset`."""
    check_options(spec)
    root, split = path_and_split(spec, split)
    return folder_dataset(root, split)


def folder_dataset(root: str | os.PathLike[str], split: str | None = None) -> ImageDataset:
    """Open a folder of pictures.

    Parameters
    ----------
    root : path
        Holds class folders, or sub-folders named after splits that hold them, or just pictures (then unlabelled).
        Hidden files, hidden folders, files that are not images and run folders (what a command wrote with ``--out``)
        do not count. Pictures beside class folders are left out with a warning.
    split : str, optional
        Which sub-folder. Classes are those of all splits together, so that indices agree between them.

    Returns
    -------
    ImageDataset
        Sorted by path; ids are paths relative to ``root``.

    Raises
    ------
    UserError
        Not a folder, no pictures, a class folder without any, two class folders with one display name, a split that
        is missing or has to be chosen.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError("not a folder", given=str(root), remedy="give the folder that holds the images")
    tops = _subfolders(root)
    named = [top for top in tops if top.lower() in _SPLIT_FOLDERS]
    if split is not None:
        splits = pick_splits(named or [top for top in tops if top == split], split, root)
    else:
        # "train" and "test" may be classes too (vehicles, say): they are splits only when nothing else holds pictures.
        is_split_root = bool(named) and not any(_images(root / top, 1) for top in tops if top not in named)
        is_split_root = is_split_root and not any(is_image_file(f) for f in root.iterdir())
        splits = pick_splits([n for n in named if _images(root / n, 1)], None, root) if is_split_root else []
    parts = splits or [""]
    folders = sorted({c for part in (named if splits else [""]) for c in _subfolders(root / part)})
    ids: list[str] = []
    labels: list[int] = []
    for part in parts:
        _add_images(root, part, folders, ids, labels)
    if not ids:
        raise UserError("no images", where=root, remedy="give a folder with jpg, png, webp, tiff, bmp or gif files")
    classes = display_names(folders, root) if max(labels) >= 0 else []
    name = root.resolve().name + (f"@{'+'.join(splits)}" if splits else "")
    return ImageDataset(name, ids, labels, classes, files=[root / i for i in ids])


def _add_images(root: Path, part: str, folders: list[str], ids: list[str], labels: list[int]) -> None:
    base = root / part
    present = set(_subfolders(base))
    loose = sorted(f.name for f in base.iterdir() if is_image_file(f) and f.is_file())
    by_class = {folder: _images(base / folder) for folder in folders if folder in present}
    if not any(by_class.values()):
        by_class = {}
    for folder, files in by_class.items():
        if not files:
            raise UserError("class without images", where=base, given=folder, remedy="add images or remove the folder")
        ids += [str(Path(part, folder, f).as_posix()) for f in files]
        labels += [folders.index(folder)] * len(files)
    if not by_class:
        ids += [Path(part, f).as_posix() for f in loose]
        labels += [-1] * len(loose)
    elif loose:
        _log.warning("%d images beside the class folders of %s are left out, such as %s", len(loose), base, loose[0])


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__")))
    return [name for name in names if not _is_run(folder / name)]


def _is_run(folder: Path) -> bool:
    """Whether a `vfm_core.runs.RunDir`, or the shards of one, was written here: its pictures are results, not data."""
    if (folder / "config.json").is_file():
        return (folder / "results.jsonl").is_file() or (folder / "environment.json").is_file()
    return (folder / "shards").is_dir() and any(folder.glob("shards/*-of-*/environment.json"))


def _images(folder: Path, at_most: int | None = None) -> list[str]:
    """List the pictures below ``folder`` as sorted relative paths; links are followed, loops and run folders not."""
    found: list[str] = []
    seen: set[str] = set()
    for where, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        below[:] = [] if real in seen else sorted(d for d in below if not d.startswith((".", "__")))
        below[:] = [d for d in below if not _is_run(Path(where, d))]
        if real not in seen:
            relative = Path(where).relative_to(folder)
            found += [(relative / f).as_posix() for f in sorted(files) if is_image_file(f)]
        seen.add(real)
        if at_most is not None and len(found) >= at_most:
            break
    return sorted(found)


def display_names(folders: Sequence[str], where: str | Path) -> list[str]:
    """Strip the number of ``NNN.Name`` folder names, keeping their order.

    Raises
    ------
    UserError
        Two folders would show under one name: they could not be told apart in results.
    """
    names = [re.sub(r"^\d+\.(?=\D)", "", folder) for folder in folders]
    first: dict[str, str] = {}
    for folder, name in zip(folders, names, strict=True):
        if name in first:
            given = f"{first[name]} and {folder} both show as {name!r}"
            raise UserError("duplicate class name", where=where, given=given, remedy="rename one of the folders")
        first[name] = folder
    return names


# ----------------------------------------------------------------------------------------------------------------- csv
_COLUMNS = ("path", "label", "split", "group", "time", "reference", "x0", "y0", "x1", "y1", "mask")
_BOX = ("x0", "y0", "x1", "y1")


def open_csv(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``csv:PATH[@SPLIT]``.

    The table needs a ``path`` column; ``label`` may be missing or empty (unknown). Labels that are all whole numbers
    sort as numbers. ``x0,y0,x1,y1`` is a box in pixels of the upright picture, ``mask`` a picture whose non-zero pixels
    are inside, ``group``, ``time`` and ``reference`` are passed on as text. Other columns are ignored, unless their
    name looks like a slip of the pen. A path on several lines gives one sample each (``path#LINE``).

    Raises
    ------
    UserError
        Naming the line and the column.
    """
    check_options(spec)
    table, split = path_and_split(spec, split)
    rows, columns = read_table(table)
    _check_columns(columns, table)
    if "split" in columns:
        blank = next((line for line, row in rows if not row["split"]), None)
        if blank is not None:
            raise UserError("empty split", where=f"{table}, line {blank}, column split", remedy="name the row's split")
        chosen = set(pick_splits({row["split"] for _, row in rows}, split, table))
    elif split not in (None, "all"):
        raise UserError("no column 'split'", where=table, given=f"@{split}", remedy="add the column or drop the split")
    classes = sorted({row["label"] for _, row in rows if row.get("label")})
    if all(re.fullmatch(r"-?\d+", c) for c in classes):
        classes.sort(key=int)
    index = {name: i for i, name in enumerate(classes)}
    ids: list[str] = []
    labels: list[int] = []
    files: list[Path] = []
    meta: list[dict[str, Any]] = []
    masks: list[Path | None] = []
    seen: set[str] = set()
    for line, row in rows:
        if "split" in columns and row["split"] not in chosen:
            continue
        if not row["path"]:
            raise UserError("empty path", where=f"{table}, line {line}, column path", remedy="give the image's path")
        ids.append(f"{row['path']}#{line}" if row["path"] in seen else row["path"])
        seen.add(row["path"])
        labels.append(index[row["label"]] if row.get("label") else -1)
        files.append(table.parent / row["path"])
        masks.append(table.parent / row["mask"] if row.get("mask") else None)
        notes: dict[str, Any] = {k: row[k] for k in ("split", "group", "time", "reference") if row.get(k)}
        box = _box(row, table, line)
        meta.append(notes | ({"box": box} if box else {}))
    if not ids:
        raise UserError("no rows", where=table, remedy="list at least one image")
    name = table.stem + (f"@{split}" if split else "")
    return ImageDataset(name, ids, labels, classes, files=files, meta=meta, masks=masks, sources=[table])


def read_table(table: Path, required: Sequence[str] = ("path",)) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """Read a CSV table.

    Parameters
    ----------
    table : Path
        UTF-8, commas, a header line. Blank lines do not count.
    required : sequence of str
        Columns that must be there.

    Returns
    -------
    rows : list of (int, dict)
        Line number in the file and cells by column, stripped.
    columns : list of str
        In lower case.

    Raises
    ------
    UserError
        Missing, not UTF-8, without a required column, or a row of another length; with the line.
    """
    if not table.is_file():
        raise UserError("not a file", given=str(table), remedy="give a table in CSV format")
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        given = f"byte {error.start}"
        raise UserError("table is not UTF-8", where=table, given=given, remedy="save it as UTF-8") from None
    header = ",".join(required)
    reader = csv.reader(io.StringIO(text, newline=""))
    rows: list[tuple[int, dict[str, str]]] = []
    columns: list[str] = []
    try:
        for cells in reader:
            where = f"{table}, line {reader.line_num}"
            cells = [cell.strip() for cell in cells]
            if not columns:
                columns = [cell.lower() for cell in cells]
                for column in required:
                    if column not in columns:
                        given = ", ".join(columns)[:200]
                        raise UserError(
                            f"no column {column!r}", where=where, given=given, remedy=f"start it with {header}"
                        )
                repeated = next((c for c in columns if columns.count(c) > 1), None)
                if repeated is not None:
                    raise UserError("column given twice", where=where, given=repeated, remedy="keep one of them")
            elif any(cells):
                if len(cells) != len(columns):
                    given = f"{len(cells)} cells for {len(columns)} columns"
                    raise UserError(
                        "wrong number of cells", where=where, given=given, remedy="quote cells that hold commas"
                    )
                rows.append((reader.line_num, dict(zip(columns, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"malformed table ({error})", where=f"{table}, line {reader.line_num}") from None
    if not columns:
        raise UserError("empty table", where=table, remedy=f"start it with the line {header}")
    return rows, columns


def _check_columns(columns: list[str], table: Path) -> None:
    for column in columns:
        near = [] if column in _COLUMNS or len(column) < 3 else closest(column, _COLUMNS, 1)
        if near and near[0] not in columns:
            raise UserError("unknown column", where=f"{table}, line 1", given=column, remedy=f"did you mean {near[0]}?")
    missing = [c for c in _BOX if c not in columns]
    if 0 < len(missing) < 4:
        raise UserError("incomplete box columns", where=f"{table}, line 1", given=f"no {', '.join(missing)}")


def _box(row: dict[str, str], table: Path, line: int) -> tuple[float, float, float, float] | None:
    if not any(row.get(c) for c in _BOX):
        return None
    values = []
    for column in _BOX:
        try:
            value = float(row[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            where = f"{table}, line {line}, column {column}"
            raise UserError(
                "not a number", where=where, given=repr(row[column]), remedy="boxes are x0,y0,x1,y1 in pixels"
            )
        values.append(value)
    x0, y0, x1, y1 = values
    if x1 <= x0 or y1 <= y0:
        where = f"{table}, line {line}, columns x0 to y1"
        raise UserError("empty box", where=where, given=f"{x0:g},{y0:g},{x1:g},{y1:g}", remedy="x1 > x0 and y1 > y0")
    return x0, y0, x1, y1

"""``domains:``: one's own pictures in several domains that share their classes. Ours.

``folder:`` and ``csv:`` of the core see one domain at a time; here the classes are those of all domains, so that a
source model's columns and a target domain's labels agree even where a domain lacks some of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from vfm_core.data import ImageDataset, pick_splits
from vfm_core.data_sources import folder_dataset, read_table
from vfm_core.errors import UserError, unknown_name
from vfm_core.specs import Spec

from ft_calibrate.readers import choose_rows, open_root, subfolders

__all__ = ["open_domains"]

_SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def open_domains(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``domains:ROOT?domain=NAME[@train|@test|@all]``.

    ROOT is a folder with a folder of pictures per domain, ``DOMAIN/[SPLIT/]CLASS/*``; or a CSV table with the columns
    ``path,label,domain[,split]``, paths relative to the table, an empty label for unknown. Where there are no splits,
    each class is split 7:3 (see `ft_calibrate.splits.per_class_split`).

    Returns
    -------
    ImageDataset
        Classes of all domains, sorted by name; meta: ``group``, the domain.

    Raises
    ------
    UserError
        No or an unknown domain, a missing column, an empty cell; with file and line.
    """
    root, split, options = open_root(spec, split, ("domain",))
    if root.is_dir():
        return _from_folders(root, split, options.get("domain"), spec)
    return _from_table(root, split, options.get("domain"), spec)


def _chosen(wanted: str | None, there: list[str], spec: Spec) -> str:
    if wanted is None:
        if len(there) == 1:
            return there[0]
        ways = ", ".join(f"?domain={name}" for name in there[:5])
        raise UserError("several domains and none chosen", where=str(spec), remedy=f"append one of {ways}")
    if wanted not in there:
        raise unknown_name("domain", wanted, there, where="?domain=")
    return wanted


def _from_folders(root: Path, split: str | None, wanted: str | None, spec: Spec) -> ImageDataset:
    there = subfolders(root)
    if not there:
        raise UserError("no folders of domains", given=str(root), remedy="it should hold DOMAIN/[SPLIT/]CLASS/*")
    domain = _chosen(wanted, there, spec)
    split_folders = {name for name in subfolders(root / domain) if name.lower() in _SPLIT_FOLDERS}
    data = folder_dataset(root / domain, split if split_folders else None)
    if not data.classes:
        raise UserError("no class folders", where=root / domain, remedy="it should hold [SPLIT/]CLASS/*")
    classes = sorted({name for other in there for name in folder_dataset(root / other, _all(root / other)).classes})
    index = np.asarray([classes.index(name) for name in data.classes])
    labels = index[data.labels]
    rows = np.arange(len(labels)) if split_folders else choose_rows(labels, split, root / domain)
    ids = [f"{domain}/{data.ids[i]}" for i in rows]
    name = f"{root.resolve().name} {domain}" + (f"@{split}" if split else "")
    meta = [{"group": domain}] * len(ids)
    return ImageDataset(name, ids, labels[rows], classes, files=[root / i for i in ids], meta=meta)


def _all(folder: Path) -> str | None:
    return "all" if any(name.lower() in _SPLIT_FOLDERS for name in subfolders(folder)) else None


def _from_table(table: Path, split: str | None, wanted: str | None, spec: Spec) -> ImageDataset:
    rows, columns = read_table(table, ("path", "label", "domain"))
    for line, row in rows:
        for column in ("path", "domain", *(("split",) if "split" in columns else ())):
            if not row[column]:
                remedy = "fill the cell or remove the line"
                raise UserError("empty cell", where=f"{table}, line {line}, column {column}", remedy=remedy)
    classes = sorted({row["label"] for _, row in rows if row["label"]})
    label_of = {"": -1} | {name: i for i, name in enumerate(classes)}
    domain = _chosen(wanted, sorted({row["domain"] for _, row in rows}), spec)
    chosen = [row for _, row in rows if row["domain"] == domain]
    if "split" in columns:
        parts = set(pick_splits({row["split"] for row in chosen}, split, table))
        chosen = [row for row in chosen if row["split"] in parts]
    else:
        positions = choose_rows([label_of[row["label"]] for row in chosen], split, table)
        chosen = [chosen[i] for i in positions]
    ids = [row["path"] for row in chosen]
    meta: list[dict[str, Any]] = [
        {"group": domain} | ({"split": row["split"]} if row.get("split") else {}) for row in chosen
    ]
    return ImageDataset(
        f"{table.stem} {domain}" + (f"@{split}" if split else ""),
        ids,
        [label_of[row["label"]] for row in chosen],
        classes,
        files=[table.parent / i for i in ids],
        meta=meta,
        sources=[table],
    )

"""Readers of the two papers' datasets and of one's own domains, behind the data specs of `vfm_core.data.open_dataset`.

====================  ==============================================================================================
``office-home:``      Office-Home, one of four domains (`readers.office_home`)
``imagenet-r:``       ImageNet-R under the 1000 ILSVRC classes (`readers.imagenet`)
``imagenet-sketch:``  ImageNet-Sketch (`readers.imagenet`)
``vtab:``             tasks of the Visual Task Adaptation Benchmark, with CLIP prompts (`readers.vtab`)
``iwildcam:``         iWildCam of WILDS 2.0, one camera as target domain, and other camera-trap tables
                      (`readers.iwildcam`)
``femnist:``          FEMNIST in LEAF's JSON, one writer as target domain (`readers.femnist`)
``inat:``             iNaturalist 2021 by supercategory (`readers.inat`)
``domains:``          one's own pictures in several domains (`readers.domains`)
====================  ==============================================================================================

A spec reads ``FAMILY:ROOT[@SPLIT][?key=value&...]``; ``@SPLIT`` may also stand at the end. Nothing is ever downloaded.
Datasets without a published split are divided class by class (`ft_calibrate.splits.per_class_split`, seed 0, over the
sorted file names), which is our choice of files; the shares are the papers'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from vfm_core.data import check_options, path_and_split
from vfm_core.errors import UserError, unknown_name
from vfm_core.images import is_image_file
from vfm_core.specs import Spec

from ft_calibrate.class_names import plain_name
from ft_calibrate.splits import per_class_split

__all__ = ["choose_rows", "existing_folder", "images_below", "open_root", "read_json", "records", "subfolders"]


def open_root(spec: Spec, split: str | None, known: Iterable[str]) -> tuple[Path, str | None, dict[str, str]]:
    """Read path, split and options of a spec; ``ROOT?key=value@SPLIT`` means ``ROOT@SPLIT?key=value``.

    Raises
    ------
    UserError
        An unknown option, no such path, two different splits.
    """
    options = dict(spec.options)
    if options and spec.source is None:
        last = next(reversed(options))
        value, at, tail = options[last].rpartition("@")
        if at and tail:
            options[last] = value
            spec = replace(spec, source=tail, options=options)
    check_options(spec, known)
    path, split = path_and_split(spec, split)
    return path, split, options


def choose_rows(
    labels: Sequence[int] | np.ndarray,
    split: str | None,
    where: str | Path,
    *,
    train: float = 0.7,
    round_up: str = "test",
) -> np.ndarray:
    """Positions of the ``train`` or ``test`` part of samples that come without a split, all for None and ``"all"``.

    Raises
    ------
    UserError
        Another split.
    """
    if split in (None, "all"):
        return np.arange(len(labels))
    parts = {"train": 0, "training": 0, "test": 1, "testing": 1, "val": 1, "valid": 1, "validation": 1}
    if str(split).lower() not in parts:
        raise unknown_name("split", str(split), ["train", "test", "all"], where=where)
    return per_class_split(labels, train, round_up=round_up)[parts[str(split).lower()]]


def subfolders(folder: Path) -> list[str]:
    """Names of the sub-folders that are not hidden, sorted.

    Raises
    ------
    UserError
        Not a folder.
    """
    if not folder.is_dir():
        raise UserError("not a folder", given=str(folder), remedy="give the folder that holds the dataset")
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def existing_folder(root: Path, names: Iterable[str]) -> Path | None:
    """Return the sub-folder that has one of the names, regardless of case, blanks, hyphens and underscores."""
    present: dict[str, str] = {}
    for name in subfolders(root):
        present.setdefault(plain_name(name), name)
    return next((root / present[key] for key in map(plain_name, names) if key in present), None)


def images_below(folder: Path) -> list[str]:
    """Names of the image files in a folder (not deeper), sorted."""
    return sorted(p.name for p in folder.iterdir() if is_image_file(p) and p.is_file())


def read_json(path: Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a JSON file.

    Parameters
    ----------
    path
        UTF-8.
    hook
        Applied to every object as soon as it is parsed.

    Raises
    ------
    UserError
        Missing, unreadable, or not JSON; with the line.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file, object_hook=hook)
    except json.JSONDecodeError as error:
        remedy = "the file may be cut off: copy it again"
        raise UserError(f"malformed JSON ({error.msg})", where=f"{path}, line {error.lineno}", remedy=remedy) from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=path, remedy="give the JSON file as published") from None
    except OSError as error:
        raise UserError(f"cannot read file of the dataset ({error.strerror})", given=str(path)) from None


def records(content: Any, key: str, fields: Iterable[str], where: Path) -> list[dict[str, Any]]:
    """Return the list of objects ``content[key]``, every one of which has the fields.

    Raises
    ------
    UserError
        There is no such list, or a record lacks a field; with its number.
    """
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise UserError(f"no list {key!r}", where=where, remedy="give the annotation file as published")
    for number, record in enumerate(found):
        missing = set(fields) - set(record) if isinstance(record, dict) else set(fields)
        if missing:
            raise UserError(f"no {', '.join(sorted(missing))}", where=f"{where}, {key}[{number}]")
    return found

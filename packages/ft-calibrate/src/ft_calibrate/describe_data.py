"""What a data spec holds: classes, pictures per class and split, seen and absent pictures. Ours, for `data`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vfm_core.data import ImageDataset, open_dataset
from vfm_core.errors import UserError

from ft_calibrate.class_names import ClassNames
from ft_calibrate.splits import Split, is_official, official_split, read_split

__all__ = ["describe", "open_any_split"]

SPLITS = ("train", "train_mini", "val", "test")


def describe(spec: str, seen: str | None = None) -> dict[str, Any]:
    """Count the pictures of a data spec.

    Parameters
    ----------
    spec : str
        With a split, that split is counted; without one, all that can be told.
    seen : str, optional
        A file of seen classes (see `ft_calibrate.splits.read_split`), the name of a reference split, or class names
        joined by commas.

    Returns
    -------
    dict
        ``spec``; ``name``; ``classes``, all names; ``splits``, a row each with ``split``, ``images``, ``unlabelled``,
        ``classes`` (that have pictures), ``smallest`` and ``largest`` (pictures of such a class); ``per_class``, a row
        per class that has pictures; with ``seen`` also ``split`` (its name) and ``groups``, a row for S, U and R in
        each split.

    Raises
    ------
    UserError
        Data that cannot be opened; seen classes that they lack.
    """
    parts = _parts(spec)
    first = next(iter(parts.values()))
    classes = list(first.classes)
    counts = {name: _counts(part) for name, part in parts.items()}
    result: dict[str, Any] = {"spec": spec, "name": first.name.rpartition("@")[0] or first.name, "classes": classes}
    result["splits"] = [_row(name, parts[name], counts[name]) for name in parts]
    result["per_class"] = [
        {"class": name, **{part: int(counts[part][i]) for part in parts}}
        for i, name in enumerate(classes)
        if any(counts[part][i] for part in parts)
    ]
    if seen is not None:
        split = _split_of(seen, classes)
        result["split"] = split.name
        result["groups"] = [
            {"group": title, "classes": len(columns), **{part: int(counts[part][columns].sum()) for part in parts}}
            for title, columns in _groups(split)
        ]
    return result


def open_any_split(spec: str) -> ImageDataset:
    """Open data, and the first of its splits where one has to be chosen: classes are the same in all.

    Raises
    ------
    UserError
        Data that cannot be opened.
    """
    try:
        return open_dataset(spec)
    except UserError as error:
        choices = _choices(error)
        if not choices:
            raise
        return open_dataset(spec, split="train" if "train" in choices else choices[0])


def _parts(spec: str) -> dict[str, ImageDataset]:
    """The splits of a spec by name; ``"all"`` where it says which, or has none."""
    try:
        whole = open_dataset(spec)
    except UserError as error:
        choices = _choices(error)
        if not choices:
            raise
        return {name: open_dataset(spec, split=name) for name in choices}
    if "@" in spec.rpartition(":")[2] or spec.startswith("tinyworld:"):
        return {"all": whole}
    found: dict[str, ImageDataset] = {}
    for name in SPLITS:
        try:
            found[name] = open_dataset(spec, split=name)
        except UserError:
            continue
    sizes = [len(part) for part in found.values()]
    return found if sum(sizes) == len(whole) and len(found) > 1 else {"all": whole}


def _choices(error: UserError) -> list[str]:
    """Names of the splits that an error about a missing choice offers."""
    if not error.what.startswith("several splits"):
        return []
    return [name for name in re.findall(r"@([^\s,]+)", error.remedy or "") if name != "all"]


def _counts(dataset: ImageDataset) -> np.ndarray:
    labels = np.asarray(dataset.labels)
    return np.bincount(labels[labels >= 0], minlength=max(len(dataset.classes), 1))


def _row(name: str, dataset: ImageDataset, counts: np.ndarray) -> dict[str, Any]:
    there = counts[counts > 0]
    return {
        "split": name,
        "images": len(dataset),
        "unlabelled": int((np.asarray(dataset.labels) < 0).sum()),
        "classes": len(there),
        "smallest": int(there.min()) if len(there) else None,
        "largest": int(there.max()) if len(there) else None,
    }


def _split_of(seen: str, classes: Sequence[str]) -> Split:
    path = Path(seen)
    if is_official(seen) and not path.is_file():
        return official_split(seen).for_classes(classes)
    if path.is_file() or path.suffix.lower() in (".json", ".txt"):
        return read_split(path, classes)
    found = ClassNames(classes, "--seen")
    names = [found.find(name.strip()) for name in seen.split(",")]
    return Split(tuple(classes), tuple(names), tuple(c for c in classes if c not in names), "--seen")


def _groups(split: Split) -> list[tuple[str, list[int]]]:
    columns = split.columns
    titles = (("seen", "S (seen)"), ("absent", "U (absent)"), ("remaining", "R (remaining)"))
    return [(title, columns[key]) for key, title in titles if columns[key]]

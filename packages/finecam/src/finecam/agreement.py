"""Agreement of a classifier's map with an attribute's map (the audit of Finer-CAM, arXiv 2501.11309, section 4.3)."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vfm_core.errors import UserError
from vfm_core.metrics import bootstrap_interval

from finecam import metrics, render

if TYPE_CHECKING:
    from finecam.render import Array, Box

COMMON = 64  # cells per side of the region both models saw, for the comparison
TOP = 0.1
FEW = 3  # images below which an interval says nothing


@dataclass(frozen=True)
class Attribute:
    """A mark that a class is known by.

    Parameters
    ----------
    name
        Class name, as the classifier spells it.
    text
        The mark in words.
    generic
        The word that is subtracted.
    """

    name: str
    text: str
    generic: str = "bird"


def read_attributes(path: str | os.PathLike[str], generic: str = "bird") -> list[Attribute]:
    """Read a CSV file with the columns ``class,attribute`` and optionally ``generic``.

    Raises
    ------
    UserError
        No such file, a missing column, an empty cell, or no rows.
    """
    path = Path(path).expanduser()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [c.strip().lower() for c in reader.fieldnames or ()]
            rows = [{k.strip().lower(): (v or "").strip() for k, v in row.items() if k} for row in reader]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError("cannot read attributes", where=path, given=e, remedy="give a CSV: class,attribute") from e
    for column in ("class", "attribute"):
        if column not in columns:
            raise UserError(
                f"no column {column!r}", where=path, given=columns, remedy="write the header class,attribute"
            )
    found = []
    for number, row in enumerate(rows, 2):
        if not row["class"] or not row["attribute"]:
            raise UserError("empty cell", where=f"{path} line {number}", remedy="give a class and an attribute")
        found.append(Attribute(row["class"], row["attribute"], row.get("generic") or generic))
    if not found:
        raise UserError("no attributes", where=path, remedy="write one row per class and attribute")
    return list(dict.fromkeys(found))


def compare_maps(a: Array, b: Array, q: float = TOP) -> dict[str, float]:
    """How far the classifier's map `a` and the attribute's map `b` (h, w), of one region, agree.

    Returns
    -------
    dict
        ``pearson``; ``iou`` of the two top fractions `q`; ``energy of classifier in attribute``, the share of map a's
        mass inside b's top region, and the reverse. All NaN when a map is constant: there is nothing to compare.
    """
    x, y = torch.from_numpy(a)[None], torch.from_numpy(b)[None]
    return {
        "pearson": float(metrics.pearson(x, y)),
        "iou": float(metrics.top_iou(x, y, q)),
        "energy of classifier in attribute": _energy(x, y, q),
        "energy of attribute in classifier": _energy(y, x, q),
    }


def _energy(of: Tensor, inside: Tensor, q: float) -> float:
    if bool(metrics.is_empty(inside)):
        return float("nan")
    return float(metrics.energy_in(of, metrics.top_mask(inside, q)))


def on_common_region(
    first: Array, first_box: Box, second: Array, second_box: Box, size: tuple[int, int]
) -> tuple[Array, Array]:
    """Two models' maps (h, w), resampled to (COMMON, COMMON) over the part of the picture that both saw.

    Raises
    ------
    UserError
        The two models saw no common part.
    """
    x0, y0 = max(first_box[0], second_box[0], 0), max(first_box[1], second_box[1], 0)
    x1, y1 = min(first_box[2], second_box[2], size[0]), min(first_box[3], second_box[3], size[1])
    if x1 - x0 < 1 or y1 - y0 < 1:
        raise UserError("the two models see no common part of the picture", given=f"{first_box} and {second_box}")

    def crop(values: Array, box: Box) -> Array:
        # The region's corner becomes the origin and its extent one unit per cell.
        sx, sy = COMMON / (x1 - x0), COMMON / (y1 - y0)
        moved = ((box[0] - x0) * sx, (box[1] - y0) * sy, (box[2] - x0) * sx, (box[3] - y0) * sy)
        return np.nan_to_num(render.to_original(values, moved, (COMMON, COMMON), (COMMON, COMMON)))

    return crop(first, first_box), crop(second, second_box)


SCORES = ("pearson", "iou", "energy of classifier in attribute", "energy of attribute in classifier")


def attribute_table(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per class and attribute: number of images, means with 95 % bootstrap intervals, and a hint.

    Two unrelated top regions of a tenth of the pixels overlap with IoU 0.053 on average; the hint names attributes
    whose agreement is not above that, whose maps were empty everywhere, or that were seen on very few images.
    """
    by_mark: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for record in records:
        for entry in record["attributes"]:
            by_mark[record["target"]["name"], entry["attribute"]].append(entry)
    chance = TOP**2 / (2 * TOP - TOP**2)
    rows = []
    for (name, text), entries in sorted(by_mark.items()):
        row: dict[str, Any] = {"class": name, "attribute": text, "images": len(entries)}
        known = [e for e in entries if e["iou"] is not None and e["iou"] == e["iou"]]
        row["empty maps"] = len(entries) - len(known)
        for score in SCORES:
            values = [e[score] for e in known if e[score] is not None]
            row[score] = tuple(float(v) for v in bootstrap_interval(values)) if values else None
        if not known:
            row["hint"] = "no map"
        elif len(known) < FEW:
            row["hint"] = "few images"
        else:
            row["hint"] = "" if row["iou"][1] > chance else "not above chance: spurious cue, or no such mark"
        rows.append(row)
    return rows

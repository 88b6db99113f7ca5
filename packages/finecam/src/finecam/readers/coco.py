"""``coco:``: instance annotations in the COCO format (Lin et al. 2014): boxes, polygons and run-length masks."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vfm_core.data import ImageDataset, check_options, path_and_split, pick_splits
from vfm_core.errors import UserError
from vfm_core.specs import Spec

from finecam.readers import Box, around, checked_box

__all__ = ["CocoDataset", "decode_rle", "fill_polygon", "open_coco"]


class CocoDataset(ImageDataset):
    """Pictures labelled by the category that covers most of them.

    Samples carry ``boxes`` [(category, box)] of all instances, ``box`` around those of the label, and ``mask``, the
    union of their segmentations. Crowd regions do not count.

    Parameters
    ----------
    sizes
        Width and height of each picture as the annotations say.
    shapes
        The segmentations of the label's instances, per picture.
    where
        The annotation file, for errors.
    """

    def __init__(
        self, *args: Any, sizes: list[tuple[int, int]], shapes: list[list[Any]], where: Path, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.sizes, self.shapes, self.where = sizes, shapes, where

    def annotate(self, i: int, image: Image.Image) -> dict[str, Any]:
        """Decode the segmentations of the label."""
        if image.size != self.sizes[i]:
            given = f"{image.width}x{image.height}, annotated as {self.sizes[i][0]}x{self.sizes[i][1]} pixels"
            remedy = "annotate the upright pictures at their full size"
            raise UserError("image and annotation differ in size", where=self.ids[i], given=given, remedy=remedy)
        if not self.shapes[i]:
            return {}
        mask = np.zeros((image.height, image.width), dtype=bool)
        for shape in self.shapes[i]:
            mask |= _shape_mask(shape, image.size, f"{self.where}, image {self.ids[i]}")
        return {"mask": mask}


def open_coco(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``coco:PATH[@SPLIT][?images=FOLDER]``.

    PATH is an annotation file, or a folder with ``annotations/instances_{split}{year}.json`` or with
    ``{split}/_annotations.coco.json``. Pictures are looked for beside the file and in the usual places
    (``{split}{year}/``, ``images/``), or in FOLDER, relative to PATH's folder.

    Raises
    ------
    UserError
        A file is missing or malformed; with the place in it.
    """
    check_options(spec, ("images",))
    path, split = path_and_split(spec, split)
    if path.is_file():
        pick_splits([], split, path)
        tables = {"": path}
        chosen = [""]
    else:
        tables = {
            p.stem.removeprefix("instances_").rstrip("0123456789"): p for p in path.glob("annotations/instances_*.json")
        }
        tables |= {p.parent.name: p for p in path.glob("*/_annotations.coco.json")}
        if not tables:
            raise UserError("no COCO annotations", given=str(path), remedy="give the .json file")
        chosen = pick_splits(tables, split, path)
    if len(chosen) > 1:
        raise UserError("coco: reads one split at a time", where=str(spec), given="@all", remedy="choose one split")
    table = tables[chosen[0]]
    name = path.resolve().stem + (f"@{split}" if split else "")
    return _read(table, name, spec.options.get("images"))


def _read(table: Path, name: str, images: str | None) -> CocoDataset:
    try:
        content = json.loads(table.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError("malformed JSON", where=f"{table}{line}", given=str(error).split(":", maxsplit=1)[0]) from None
    pictures = _records(content, "images", {"id", "file_name", "width", "height"}, table)
    categories = _records(content, "categories", {"id", "name"}, table)
    instances = _records(content, "annotations", {"image_id", "category_id", "bbox"}, table)
    categories.sort(key=lambda c: c["id"])
    index = {c["id"]: i for i, c in enumerate(categories)}
    classes = [str(c["name"]) for c in categories]
    if len(set(classes)) < len(classes) or len(index) < len(classes):
        raise UserError("category given twice", where=table, given=next(c for c in classes if classes.count(c) > 1))
    by_image: dict[Any, list[tuple[int, Box, dict[str, Any]]]] = defaultdict(list)
    known = {p["id"] for p in pictures}
    for number, instance in enumerate(instances):
        where = f"{table}, annotations[{number}]"
        for key, options in (("category_id", index), ("image_id", known)):
            if instance[key] not in options:
                raise UserError(f"unknown {key}", where=where, given=instance[key])
        if not instance.get("iscrowd"):
            by_image[instance["image_id"]].append(
                (index[instance["category_id"]], _box(instance["bbox"], where), instance)
            )
    folder = _folder(table, images, pictures)
    labels, meta, shapes = [], [], []
    for picture in pictures:
        label, notes, segments = _label(by_image.get(picture["id"], []), classes)
        labels.append(label)
        meta.append(notes)
        shapes.append(segments)
    return CocoDataset(
        name,
        [str(p["file_name"]) for p in pictures],
        labels,
        classes,
        files=[folder / str(p["file_name"]) for p in pictures],
        meta=meta,
        sources=[table],
        sizes=[(int(p["width"]), int(p["height"])) for p in pictures],
        shapes=shapes,
        where=table,
    )


def _label(
    instances: list[tuple[int, Box, dict[str, Any]]], classes: list[str]
) -> tuple[int, dict[str, Any], list[Any]]:
    if not instances:
        return -1, {}, []
    area: dict[int, float] = defaultdict(float)
    for category, (x0, y0, x1, y1), instance in instances:
        area[category] += float(instance.get("area") or (x1 - x0) * (y1 - y0))
    label = max(sorted(area), key=lambda c: area[c])
    notes = {
        "box": around(box for category, box, _ in instances if category == label),
        "boxes": [(classes[category], box) for category, box, _ in instances],
    }
    shapes = [i["segmentation"] for category, _, i in instances if category == label and i.get("segmentation")]
    return label, notes, shapes


def _records(content: Any, key: str, fields: set[str], table: Path) -> list[dict[str, Any]]:
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list) or (key == "images" and not records):
        raise UserError(f"no list {key!r}", where=table, remedy="give an instances file in COCO format")
    for number, record in enumerate(records):
        missing = fields - set(record) if isinstance(record, dict) else fields
        if missing:
            raise UserError(f"no {', '.join(sorted(missing))}", where=f"{table}, {key}[{number}]")
    return records


def _box(values: Any, where: str) -> Box:
    try:
        x, y, w, h = (float(v) for v in values)
    except (TypeError, ValueError):
        raise UserError("bbox is not four numbers", where=where, given=values) from None
    return checked_box(x, y, x + w, y + h, where)


def _folder(table: Path, images: str | None, pictures: list[dict[str, Any]]) -> Path:
    first = str(pictures[0]["file_name"])
    part = table.stem.removeprefix("instances_")
    root = table.parent.parent
    usual = [table.parent, table.parent / "images", root / part, root / "images" / part, root / "images"]
    places = [table.parent / images, Path(images)] if images else usual
    for place in places:
        if (place / first).exists():
            return place
    if images:
        raise UserError("no such image", given=str(places[0] / first), remedy="check ?images=")
    raise UserError(
        "images of the annotations not found", given=first, where=table, remedy="name their folder: ?images="
    )


# --------------------------------------------------------------------------------------------------------------- masks
def _shape_mask(shape: Any, size: tuple[int, int], where: str) -> np.ndarray:
    width, height = size
    try:
        if isinstance(shape, dict):
            if [int(v) for v in shape["size"]] != [height, width]:
                raise ValueError(f"size {shape['size']} for {width}x{height} pixels")
            return decode_rle(shape["counts"], (height, width))
        mask = np.zeros((height, width), dtype=bool)
        for ring in shape:
            mask |= fill_polygon(np.asarray(ring, dtype=float).reshape(-1, 2), (height, width))
        return mask
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"malformed segmentation ({error})", where=where) from None


def fill_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Fill a polygon by the even-odd rule.

    Parameters
    ----------
    points : ndarray, (n, 2)
        x and y of the corners, in pixel edges; closed by itself.
    size : tuple of int
        Height and width.

    Returns
    -------
    ndarray of bool, (H, W)
        Pixels whose centre lies inside.
    """
    height, width = size
    crossings = np.zeros((height, width + 1), dtype=np.int64)
    rows = np.arange(height) + 0.5
    for (xa, ya), (xb, yb) in zip(points, np.roll(points, -1, axis=0)):
        hit = np.flatnonzero((ya <= rows) != (yb <= rows))
        x = xa + (rows[hit] - ya) * (xb - xa) / (yb - ya) if len(hit) else hit
        # Centres left of a crossing see it on their right: count them by their number, sum from the right below.
        np.add.at(crossings, (hit, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)), 1)
    right = crossings[:, ::-1].cumsum(axis=1)[:, ::-1]
    return right[:, 1:] % 2 == 1


def decode_rle(counts: list[int] | str, size: tuple[int, int]) -> np.ndarray:
    """Decode COCO's run lengths, plain or compressed.

    Parameters
    ----------
    counts : list of int or str
        Lengths of runs of 0 and 1 in turn, down the columns; or their compressed form: five bits per character,
        lowest first, bit six marks a continuation, and from the fourth on differences to the one before last.
    size : tuple of int
        Height and width.

    Returns
    -------
    ndarray of bool, (H, W)

    Raises
    ------
    ValueError
        Runs that do not fill the picture.
    """
    runs = _uncompressed(counts) if isinstance(counts, str) else [int(c) for c in counts]
    height, width = size
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"runs cover {sum(runs)} of {height * width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _uncompressed(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value |= -1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed runs end too early")
    return runs

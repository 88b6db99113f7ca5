"""``inat:``: iNaturalist 2021 (Van Horn et al. 2021) by supercategory; HT uses the Fungi."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vfm_core.data import ImageDataset, pick_splits
from vfm_core.errors import UserError, unknown_name
from vfm_core.specs import Spec

from ft_calibrate.readers import open_root, read_json, records

__all__ = ["open_inat"]

_SPLITS = ("train_mini", "train", "val")
_KEEP = {
    "images": ("id", "file_name", "date", "latitude", "longitude"),
    "annotations": ("image_id", "category_id"),
    "categories": ("id", "name", "common_name", "supercategory"),
}
_NAMES = ("name", "common")


def open_inat(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``inat:ROOT@train|@train_mini|@val[?supercategory=Fungi][&names=name|common]``.

    ROOT is an annotation file in COCO style, or the folder that holds ``train.json``, ``train_mini.json`` or
    ``val.json`` (also in ``annotations/``, also with a year before the name) and the pictures, whose ``file_name``
    starts with the split's folder.

    Parameters
    ----------
    spec : Spec
        ``supercategory``: one of the file's, such as Fungi, Plants or Birds, in any case; all by default. ``names``:
        what classes are called, scientific (default) or common names; where a common name is missing or shared, the
        scientific one is used or added.
    split : str, optional
        The same as ``@SPLIT``.

    Returns
    -------
    ImageDataset
        Classes are the categories of the supercategory in the order of their ids, whether or not pictured. Meta:
        ``time``, ``latitude``, ``longitude`` where known.

    Raises
    ------
    UserError
        A file is missing, malformed or lacks a field, an unknown supercategory or category, a picture annotated twice;
        naming the place in the file.
    """
    root, split, options = open_root(spec, split, ("supercategory", "names"))
    kind = options.get("names", "name")
    if kind not in _NAMES:
        raise unknown_name("kind of names", kind, _NAMES, where="?names=")
    if root.is_file():
        if split not in (None, "all"):
            raise UserError("a single file has no splits", where=str(spec), given=f"@{split}", remedy="drop it")
        table = root
    else:
        tables = _tables(root)
        if split == "all":
            raise UserError("inat: reads one split at a time", where=str(spec), remedy=f"choose {', '.join(tables)}")
        table = tables[pick_splits(tables, split, root)[0]]
    content = read_json(table, _slim)
    categories = _chosen_categories(content, options.get("supercategory"), table)
    column = {c["id"]: i for i, c in enumerate(categories)}
    known = {c["id"] for c in content["categories"]}
    label_of: dict[Any, int] = {}
    for number, record in enumerate(records(content, "annotations", ("image_id", "category_id"), table)):
        where = f"{table}, annotations[{number}]"
        if record["category_id"] not in known:
            raise UserError("unknown category_id", where=where, given=record["category_id"], remedy="mend the file")
        if record["image_id"] in label_of:
            raise UserError("picture annotated twice", where=where, given=record["image_id"], remedy="keep one")
        label_of[record["image_id"]] = column.get(record["category_id"], -1)
    pictures = records(content, "images", ("id", "file_name"), table)
    unknown = set(label_of) - {p["id"] for p in pictures}
    if unknown:
        given = sorted(unknown, key=str)[0]
        raise UserError("annotation of a picture that is not listed", where=f"{table}, images", given=given)
    chosen = [p for p in pictures if label_of.get(p["id"], -1) >= 0]
    if not chosen:
        raise UserError("no pictures of the supercategory", where=table, given=options.get("supercategory"))
    ids = [str(p["file_name"]) for p in chosen]
    base = _base(table, ids)
    title = "iNaturalist 2021" + (f" {options['supercategory']}" if "supercategory" in options else "")
    return ImageDataset(
        f"{title} {table.stem}",
        ids,
        [label_of[p["id"]] for p in chosen],
        _class_names(categories, kind),
        files=[base / i for i in ids],
        meta=[_notes(p) for p in chosen],
        sources=[table],
    )


def _tables(root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for place in (root, root / "annotations"):
        for split in _SPLITS:
            for path in sorted(place.glob(f"*{split}.json")):
                prefix = path.stem.removesuffix(split)
                if not prefix.strip("0123456789_-"):
                    found.setdefault(split, path)
    if not found:
        remedy = "it should hold train.json, train_mini.json or val.json"
        raise UserError("no annotations of iNaturalist 2021", given=str(root), remedy=remedy)
    return found


def _slim(value: dict[str, Any]) -> dict[str, Any]:
    """Drop fields that are not used while the file is parsed: 2.7 million pictures carry a dozen each."""
    for key, marks in (("images", ("file_name",)), ("annotations", ("image_id",)), ("categories", ("supercategory",))):
        if all(mark in value for mark in marks):
            return {k: value[k] for k in _KEEP[key] if k in value}
    return value


def _chosen_categories(content: Any, wanted: str | None, table: Path) -> list[dict[str, Any]]:
    categories = records(content, "categories", ("id", "name"), table)
    if wanted is not None:
        for number, category in enumerate(categories):
            if "supercategory" not in category:
                raise UserError("no supercategory", where=f"{table}, categories[{number}]", remedy="drop the filter")
        there = {str(c["supercategory"]).casefold(): str(c["supercategory"]) for c in categories}
        if wanted.casefold() not in there:
            raise unknown_name("supercategory", wanted, there.values(), where=table)
        categories = [c for c in categories if str(c["supercategory"]).casefold() == wanted.casefold()]
    repeated = [i for i, n in Counter(c["id"] for c in categories).items() if n > 1]
    if repeated:
        raise UserError("category given twice", where=f"{table}, categories", given=repeated[0], remedy="keep one")
    return sorted(categories, key=lambda c: c["id"])


def _class_names(categories: list[dict[str, Any]], kind: str) -> list[str]:
    plain = [str(c["name"]) for c in categories]
    if kind == "common":
        count = Counter(str(c.get("common_name") or c["name"]) for c in categories)
        common = [str(c.get("common_name") or c["name"]) for c in categories]
        plain = [c if count[c] == 1 else f"{c} ({p})" for c, p in zip(common, plain, strict=True)]
    ids = [c["id"] for c in categories]
    count = Counter(plain)
    return [name if count[name] == 1 else f"{name} ({i})" for name, i in zip(plain, ids, strict=True)]


def _base(table: Path, ids: list[str]) -> Path:
    places = [table.parent, table.parent.parent, table.parent / "images"]
    for place in places:
        if any((place / i).is_file() for i in ids[:20]):
            return place
    remedy = f"unpack the pictures beside {table.name}"
    raise UserError("pictures of the annotations not found", where=table, given=ids[0], remedy=remedy)


def _notes(picture: dict[str, Any]) -> dict[str, Any]:
    notes = {"time": picture.get("date"), "latitude": picture.get("latitude"), "longitude": picture.get("longitude")}
    return {key: value for key, value in notes.items() if value not in (None, "")}

"""``pet:`` and ``dogs:``: Oxford-IIIT Pet (Parkhi et al. 2012) and Stanford Dogs (Khosla et al. 2011)."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from PIL import Image
from vfm_core.data import ImageDataset, check_options, path_and_split, pick_splits
from vfm_core.data_sources import display_names
from vfm_core.errors import UserError
from vfm_core.images import is_image_file, read_label_map
from vfm_core.specs import Spec

from finecam.readers import Box, around, checked_box, find_root, numbers, read_lines
from finecam.readers.vehicles import read_mat

__all__ = ["DogsDataset", "PetDataset", "open_dogs", "open_pet"]

PET = 1
"""Trimap value of the animal; 2 is background, 3 its undecided border."""


# ----------------------------------------------------------------------------------------------------------------- pet
class PetDataset(ImageDataset):
    """Oxford-IIIT Pet; samples carry ``mask`` (the trimap's inside) and ``species`` ("cat" or "dog")."""

    def annotate(self, i: int, image: Image.Image) -> dict[str, Any]:
        """Read the trimap."""
        path = None if self.masks is None else self.masks[i]
        return {} if path is None else {"mask": read_label_map(path, image.size) == PET}


def open_pet(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``pet:PATH[@trainval|@test]``.

    PATH, or ``PATH/oxford-iiit-pet``, holds ``images/*.jpg``, ``annotations/{trainval,test}.txt`` ("name class species
    breed", from 1; species 1 is a cat) and, where present, ``annotations/trimaps/*.png``.

    Raises
    ------
    UserError
        A file is missing, a line is malformed, or a class number has two names; with file and line.
    """
    check_options(spec)
    path, split = path_and_split(spec, split)
    root = find_root(path, "annotations", "oxford-iiit-pet")
    folder = root / "annotations"
    tables = {s: folder / f"{s}.txt" for s in ("trainval", "test") if (folder / f"{s}.txt").exists()}
    chosen = pick_splits(tables, split, folder)
    names: dict[int, str] = {}
    rows: list[tuple[str, int, int]] = []
    for name, table in tables.items():  # the classes are those of both lists
        for line, (image, *fields) in read_lines(table, 4):
            where = f"{table}, line {line}"
            label, species, _ = numbers(int, fields, table, line)
            breed = image.rpartition("_")[0]
            if not breed or label < 1 or species not in (1, 2):
                remedy = "expected name_NUMBER, a class from 1, and species 1 or 2"
                raise UserError("malformed entry", where=where, given=f"{image} {label} {species}", remedy=remedy)
            if names.setdefault(label, breed) != breed:
                raise UserError("class has two names", where=where, given=f"{names[label]} and {breed}")
            if name in chosen:
                rows.append((image, label, species))
    order = {label: i for i, label in enumerate(sorted(names))}
    trimaps = folder / "trimaps"
    present = {p.stem for p in trimaps.glob("*.png")} if trimaps.is_dir() else set()
    return PetDataset(
        "Oxford-IIIT Pet" + (f"@{split}" if split else ""),
        [f"{image}.jpg" for image, _, _ in rows],
        [order[label] for _, label, _ in rows],
        display_names([names[label] for label in order], folder),
        files=[root / "images" / f"{image}.jpg" for image, _, _ in rows],
        meta=[{"species": ("cat", "dog")[species - 1]} for _, _, species in rows],
        masks=[trimaps / f"{image}.png" if image in present else None for image, _, _ in rows],
    )


# ---------------------------------------------------------------------------------------------------------------- dogs
class DogsDataset(ImageDataset):
    """Stanford Dogs; samples carry ``boxes`` of every dog and ``box`` around all of them.

    Parameters
    ----------
    root
        Holds ``Annotation`` (or not: then there are no boxes).
    """

    def __init__(
        self, root: Path, images: Path, name: str, ids: list[str], labels: list[int], classes: list[str], **options: Any
    ) -> None:
        super().__init__(name, ids, labels, classes, files=[images / i for i in ids], **options)
        self.boxes = next((root / n for n in ("Annotation", "annotations", "Annotations") if (root / n).is_dir()), None)

    def meta_of(self, index: int) -> dict[str, Any]:
        """Read the picture's XML file."""
        if self.boxes is None:
            return {}
        relative = Path(self.ids[self._position(index)]).with_suffix("")
        path = next((p for p in (self.boxes / relative, self.boxes / f"{relative}.xml") if p.is_file()), None)
        if path is None:
            return {}
        boxes = _voc_boxes(path)
        return {"box": around(boxes), "boxes": boxes}


def _voc_boxes(path: Path) -> list[Box]:
    try:
        tree = ElementTree.parse(path)
    except ElementTree.ParseError as error:
        raise UserError(f"malformed XML ({error.msg})", where=f"{path}, line {error.position[0]}") from None
    boxes = []
    for number, found in enumerate(tree.iter("bndbox"), 1):
        texts = [(found.findtext(tag) or "").strip() for tag in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x0, y0, x1, y1 = (float(t) for t in texts)
        except ValueError:
            raise UserError("malformed box", where=f"{path}, bndbox {number}", given=texts) from None
        boxes.append(checked_box(x0, y0, x1, y1, f"{path}, bndbox {number}"))
    if not boxes:
        raise UserError("no bndbox", where=path)
    return boxes


def open_dogs(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``dogs:PATH[@train|@test]``.

    PATH holds ``Images/nXXXXXXXX-Breed/*.jpg``, where present ``Annotation/nXXXXXXXX-Breed/*`` (XML), and
    ``{train,test}_list.mat`` (here or in ``lists/``); without the lists there are no splits.

    Raises
    ------
    UserError
        A file is missing or malformed.
    """
    check_options(spec)
    path, split = path_and_split(spec, split)
    images = next((path / n for n in ("Images", "images") if (path / n).is_dir()), None)
    if images is None:
        raise UserError("not a folder of this dataset", given=str(path), remedy="it should hold Images")
    folders = sorted(p.name for p in images.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = display_names([f.partition("-")[2] or f for f in folders], images)
    index = {folder: i for i, folder in enumerate(folders)}
    lists = next((p for p in (path, path / "lists") if (p / "train_list.mat").exists()), None)
    sources: list[Path] = []
    if lists is None:
        pick_splits([], split, path)
        ids = [f"{f}/{p.name}" for f in folders for p in sorted((images / f).iterdir()) if is_image_file(p)]
    else:
        tables = {s: lists / f"{s}_list.mat" for s in ("train", "test") if (lists / f"{s}_list.mat").exists()}
        sources = [tables[s] for s in pick_splits(tables, split, lists)]
        ids = [str(cell.item()) for t in sources for cell in read_mat(t, "file_list")["file_list"].ravel()]
    unknown = next((i for i in ids if i.partition("/")[0] not in index), None)
    if unknown is not None:
        raise UserError("no folder for a listed image", where=images, given=unknown, remedy="unpack all of images.tar")
    if not ids:
        raise UserError("no images", where=images)
    labels = [index[i.partition("/")[0]] for i in ids]
    name = "Stanford Dogs" + (f"@{split}" if split else "")
    return DogsDataset(path, images, name, ids, labels, classes, sources=sources)

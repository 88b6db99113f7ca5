"""``cars:`` and ``aircraft:``: Stanford Cars (Krause et al. 2013) and FGVC-Aircraft (Maji et al. 2013).

Both give boxes as inclusive 1-based pixel ranges.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vfm_core.data import ImageDataset, check_options, path_and_split, pick_splits
from vfm_core.data_sources import folder_dataset
from vfm_core.errors import UserError, unknown_name
from vfm_core.images import read_image
from vfm_core.specs import Spec

from finecam.readers import Box, checked_box, find_root, numbers, read_lines

__all__ = ["AircraftDataset", "open_aircraft", "open_cars", "read_mat"]

BANNER = 20
"""Height in pixels of the copyright banner at the bottom of every FGVC-Aircraft picture."""

_LEVELS = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}


def read_mat(path: Path, *keys: str) -> dict[str, Any]:
    """Read a MATLAB file of the dataset.

    Raises
    ------
    UserError
        Missing, damaged, or without one of ``keys``.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise UserError("file of the dataset is missing", given=str(path), remedy="check the dataset's folder")
    try:
        content = loadmat(path, squeeze_me=False)
    except Exception as error:  # scipy's readers raise many things on damaged files
        raise UserError(f"cannot read MATLAB file ({error})", given=str(path)) from error
    for key in keys:
        if key not in content:
            raise UserError(f"no variable {key!r}", where=path, given=", ".join(k for k in content if k[0] != "_"))
    return content


# ---------------------------------------------------------------------------------------------------------------- cars
def open_cars(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``cars:PATH[@train|@test]``.

    PATH, or ``PATH/stanford_cars`` (torchvision's layout), holds ``devkit/cars_meta.mat``,
    ``devkit/cars_train_annos.mat`` with ``cars_train/``, and ``cars_test_annos_withlabels.mat`` (here or in the devkit)
    with ``cars_test/``; or the single ``cars_annos.mat`` of the first release; or class folders, as exported by others.

    Raises
    ------
    UserError
        A file is missing, or an annotation is malformed, by its number.
    """
    check_options(spec)
    path, split = path_and_split(spec, split)
    for root in (path, path / "stanford_cars"):
        if (root / "devkit").is_dir():
            return _cars_devkit(root, split)
        if (root / "cars_annos.mat").exists():
            return _cars_single(root, split)
    return folder_dataset(path, split)


def _cars_devkit(root: Path, split: str | None) -> ImageDataset:
    meta_file = root / "devkit" / "cars_meta.mat"
    classes = [str(cell.item()) for cell in read_mat(meta_file, "class_names")["class_names"].ravel()]
    labelled = "cars_test_annos_withlabels.mat"
    test = next((p for p in (root / labelled, root / "devkit" / labelled) if p.exists()), None)
    tables = {"train": root / "devkit" / "cars_train_annos.mat"} | ({"test": test} if test else {})
    chosen = pick_splits(tables, split, root)
    files, labels, meta = [], [], []
    for name in chosen:
        for number, row in enumerate(read_mat(tables[name], "annotations")["annotations"].ravel(), 1):
            label, box = _car(row, len(classes), f"{tables[name]}, annotation {number}")
            files.append(f"cars_{name}/{_text(row, 'fname')}")
            labels.append(label)
            meta.append({"box": box})
    sources = [meta_file, *(tables[name] for name in chosen)]
    return _cars(root, split, files, labels, classes, meta, sources)


def _cars_single(root: Path, split: str | None) -> ImageDataset:
    table = root / "cars_annos.mat"
    content = read_mat(table, "annotations", "class_names")
    classes = [str(cell.item()) for cell in content["class_names"].ravel()]
    rows = list(enumerate(content["annotations"].ravel(), 1))
    parts = ["test" if int(row["test"].item()) else "train" for _, row in rows]
    chosen = pick_splits(parts, split, root)
    files, labels, meta = [], [], []
    for (number, row), part in zip(rows, parts, strict=True):
        if part in chosen:
            label, box = _car(row, len(classes), f"{table}, annotation {number}")
            files.append(_text(row, "relative_im_path"))
            labels.append(label)
            meta.append({"box": box})
    return _cars(root, split, files, labels, classes, meta, [table])


def _cars(
    root: Path,
    split: str | None,
    ids: list[str],
    labels: list[int],
    classes: list[str],
    meta: list[dict[str, Box]],
    sources: list[Path],
) -> ImageDataset:
    name = "Stanford Cars" + (f"@{split}" if split else "")
    return ImageDataset(name, ids, labels, classes, files=[root / i for i in ids], meta=meta, sources=sources)


def _text(row: Any, field: str) -> str:
    return str(row[field].item())


def _car(row: Any, classes: int, where: str) -> tuple[int, Box]:
    names = row.dtype.names or ()
    for field in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class"):
        if field not in names:
            raise UserError(f"no field {field!r}", where=where, given=", ".join(names))
        if row[field].size != 1:
            raise UserError(f"{field} is not one number", where=where, given=repr(row[field]))
    # MATLAB stores uint8 for small numbers: without the conversion 1 - 1 and 250 + 10 would wrap around.
    x1, y1, x2, y2, label = (float(row[f].item()) for f in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class"))
    if not 1 <= label <= classes:
        raise UserError("class out of range", where=where, given=f"{label:g}", remedy=f"classes are 1..{classes}")
    return int(label) - 1, checked_box(x1 - 1, y1 - 1, x2, y2, where)


# ------------------------------------------------------------------------------------------------------------ aircraft
class AircraftDataset(ImageDataset):
    """FGVC-Aircraft without the copyright banner."""

    def read(self, i: int) -> Image.Image:
        """Decode a picture and cut off the banner."""
        assert self.files is not None
        image = read_image(self.files[i])
        width, height = image.size
        if height <= BANNER:
            given = f"{width}x{height} pixels"
            raise UserError("picture is not higher than its banner", where=self.files[i], given=given)
        return image.crop((0, 0, width, height - BANNER))

    def annotate(self, i: int, image: Image.Image) -> dict[str, Any]:
        """Limit the box to what is left of the picture."""
        box = self.meta_of(i).get("box")
        if box is None:
            return {}
        limited = np.minimum(box, [image.width, image.height, image.width, image.height]).tolist()
        return {"box": tuple(limited)}


def open_aircraft(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``aircraft:PATH[@train|@val|@trainval|@test][?level=variant|family|manufacturer]``.

    PATH is ``fgvc-aircraft-2013b`` or the folder that holds it: ``data/images/*.jpg``,
    ``data/images_{level}_{split}.txt`` ("image class"), ``data/variants.txt`` and its like, ``data/images_box.txt``
    ("image x1 y1 x2 y2").

    Raises
    ------
    UserError
        A file is missing or a line is malformed; with file and line.
    """
    check_options(spec, ("level",))
    level = spec.options.get("level", "variant")
    if level not in _LEVELS:
        raise unknown_name("level", level, _LEVELS, where=str(spec))
    path, split = path_and_split(spec, split)
    data = find_root(path, f"data/{_LEVELS[level]}", "fgvc-aircraft-2013b") / "data"
    classes = [name for _, (name,) in read_lines(data / _LEVELS[level], 1, rest=True)]
    index = {name: i for i, name in enumerate(classes)}
    there = [s for s in ("train", "val", "trainval", "test") if (data / f"images_{level}_{s}.txt").exists()]
    chosen = [split] if split in there else pick_splits([s for s in there if s != "trainval"], split, data)
    labels: dict[str, int] = {}
    tables = [data / f"images_{level}_{s}.txt" for s in chosen]
    for table in tables:
        for line, (image, name) in read_lines(table, 2, rest=True):
            if name not in index:
                raise UserError("class is not listed", where=f"{table}, line {line}", given=repr(name))
            labels[image] = index[name]
    boxes: dict[str, Box] = {}
    box_file = data / "images_box.txt"
    if box_file.exists():
        for line, (image, *fields) in read_lines(box_file, 5):
            x1, y1, x2, y2 = numbers(float, fields, box_file, line)
            boxes[image] = checked_box(x1 - 1, y1 - 1, x2, y2, f"{box_file}, line {line}")
    return AircraftDataset(
        f"FGVC-Aircraft {level}" + (f"@{split}" if split else ""),
        list(labels),
        list(labels.values()),
        classes,
        files=[data / "images" / f"{image}.jpg" for image in labels],
        meta=[{"box": boxes[image]} if image in boxes else {} for image in labels],
        sources=[*tables, box_file],
    )

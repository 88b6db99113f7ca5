"""``cub:PATH[@train|@test]``: CUB-200-2011 in its original layout (Wah et al. 2011).

``images.txt`` "id path", ``image_class_labels.txt`` "id class", ``train_test_split.txt`` "id 1 = train",
``classes.txt`` "class NNN.Name", ``bounding_boxes.txt`` "id x y w h"; where present ``parts/parts.txt`` "part name",
``parts/part_locs.txt`` "id part x y visible", ``segmentations/NNN.Name/name.png`` and, with ``?attributes=1``,
``attributes/image_attribute_labels.txt`` "id attribute present certainty time": some lines of it have more fields, of
which the first four count. The archive puts ``attributes.txt`` beside the dataset's folder; copies have it inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vfm_core.data import ImageDataset, check_options, path_and_split, pick_splits
from vfm_core.data_sources import display_names
from vfm_core.errors import UserError
from vfm_core.images import read_label_map
from vfm_core.specs import Spec

from finecam.readers import checked_box, find_root, numbers, part_discs, read_lines

__all__ = ["CubDataset", "open_cub"]

MAJORITY = 128
"""Segmentations hold the share of annotators, 0..255, who drew a pixel inside."""


class CubDataset(ImageDataset):
    """CUB-200-2011, or a part of it in the same format.

    Samples carry ``box``, ``parts`` (visible ones), ``part_masks`` and ``part_radius``, ``mask`` where segmented, and
    ``attributes`` {name: certainty 1..4} of those marked present, where asked for.

    Parameters
    ----------
    split
        Name of the part, for people.
    rows
        Image ids of the part, in file order.
    tables
        What the text files say, by image id.
    """

    def __init__(self, root: Path, split: str | None, rows: list[int], tables: Tables) -> None:
        meta: list[dict[str, Any]] = []
        for i in rows:
            notes: dict[str, Any] = {"box": tables.boxes[i]} if i in tables.boxes else {}
            if tables.part_names:
                notes["parts"] = tables.parts.get(i, {})
            if tables.attributes is not None:
                notes["attributes"] = tables.attributes.get(i, {})
            meta.append(notes)
        files = [root / "images" / tables.paths[i] for i in rows]
        folder = root / "segmentations"
        masks = [folder / Path(tables.paths[i]).with_suffix(".png") for i in rows] if folder.is_dir() else None
        super().__init__(
            "CUB-200-2011" + (f"@{split}" if split else ""),
            [tables.paths[i] for i in rows],
            [tables.labels[i] for i in rows],
            tables.classes,
            files=files,
            meta=meta,
            masks=masks,
        )

    def annotate(self, i: int, image: Image.Image) -> dict[str, Any]:
        """Draw the part discs and read the segmentation."""
        found = part_discs(self.meta_of(i), image.size)
        path = None if self.masks is None else self.masks[i]
        if path is not None:
            found["mask"] = read_label_map(path, image.size) >= MAJORITY
        return found


class Tables:
    """The text files of the dataset, each checked against ``images.txt``."""

    def __init__(self, root: Path, attributes: bool) -> None:
        self.root = root
        self.paths: dict[int, str] = {}
        listing = root / "images.txt"
        for line, (key, path) in read_lines(listing, 2, rest=True):
            (i,) = numbers(int, [key], listing, line)
            if i in self.paths:
                raise UserError("image id given twice", where=f"{listing}, line {line}", given=i)
            self.paths[i] = path
        self._classes()
        self.train = {i: bool(v) for _, i, (v,) in self._by_image("train_test_split.txt", int, 1)}
        self._complete(self.train, "train_test_split.txt")
        self.boxes = {
            i: checked_box(x, y, x + w, y + h, f"{root / 'bounding_boxes.txt'}, line {line}")
            for line, i, (x, y, w, h) in self._by_image("bounding_boxes.txt", float, 4)
        }
        self._parts()
        self.attributes: dict[int, dict[str, int]] | None = self._attributes() if attributes else None

    def _classes(self) -> None:
        table = self.root / "classes.txt"
        named = {numbers(int, [k], table, line)[0]: name for line, (k, name) in read_lines(table, 2, rest=True)}
        order = {key: index for index, key in enumerate(sorted(named))}
        self.classes = display_names([named[key] for key in sorted(named)], table)
        self.labels: dict[int, int] = {}
        for line, i, (key,) in self._by_image("image_class_labels.txt", int, 1):
            if key not in order:
                where = f"{self.root / 'image_class_labels.txt'}, line {line}"
                raise UserError("class is not in classes.txt", where=where, given=key)
            self.labels[i] = order[key]
        self._complete(self.labels, "image_class_labels.txt")

    def _parts(self) -> None:
        table = self.root / "parts" / "parts.txt"
        self.part_names: dict[int, str] = {}
        self.parts: dict[int, dict[str, tuple[float, float]]] = {}
        if not table.exists():
            return
        for line, (key, name) in read_lines(table, 2, rest=True):
            self.part_names[numbers(int, [key], table, line)[0]] = name
        for line, i, (part, x, y, visible) in self._by_image("parts/part_locs.txt", float, 4):
            if int(part) not in self.part_names:
                where = f"{self.root / 'parts' / 'part_locs.txt'}, line {line}"
                raise UserError("part is not in parts.txt", where=where, given=int(part))
            if visible:
                self.parts.setdefault(i, {})[self.part_names[int(part)]] = (x, y)

    def _attributes(self) -> dict[int, dict[str, int]]:
        places = [self.root / "attributes" / "attributes.txt", self.root.parent / "attributes.txt"]
        names_file = next((p for p in [*places, self.root / "attributes.txt"] if p.exists()), places[0])
        names = {
            numbers(int, [key], names_file, line)[0]: name for line, (key, name) in read_lines(names_file, 2, rest=True)
        }
        found: dict[int, dict[str, int]] = {}
        for line, i, (attribute, present, certainty) in self._by_image("attributes/image_attribute_labels.txt", int, 3):
            if attribute not in names:
                where = f"{self.root / 'attributes' / 'image_attribute_labels.txt'}, line {line}"
                raise UserError("attribute is not in attributes.txt", where=where, given=attribute)
            if present:
                found.setdefault(i, {})[names[attribute]] = certainty
        return found

    def _by_image(self, name: str, kind: Any, count: int) -> Any:
        """Yield line, image id and ``count`` numbers of each line."""
        table = self.root / name
        for line, (key, *fields) in read_lines(table, count + 1):
            (i,) = numbers(int, [key], table, line)
            if i not in self.paths:
                raise UserError("image id is not in images.txt", where=f"{table}, line {line}", given=i)
            yield line, i, numbers(kind, fields, table, line)

    def _complete(self, table: dict[int, Any], name: str) -> None:
        missing = next((i for i in self.paths if i not in table), None)
        if missing is not None:
            raise UserError("image without an entry", where=self.root / name, given=f"id {missing}")


def open_cub(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``cub:PATH[@train|@test][?attributes=1]``; PATH is ``CUB_200_2011`` or the folder that holds it.

    Raises
    ------
    UserError
        A file is missing or a line is malformed; with file and line.
    """
    check_options(spec, ("attributes",))
    path, split = path_and_split(spec, split)
    root = find_root(path, "images.txt", "CUB_200_2011")
    tables = Tables(root, spec.options.get("attributes", "0") not in ("0", "false", "no"))
    part = {i: "train" if tables.train[i] else "test" for i in tables.paths}
    chosen = pick_splits(part.values(), split, root)
    rows = [i for i in tables.paths if part[i] in chosen]
    return CubDataset(root, split, rows, tables)


def attribute_matrix(dataset: ImageDataset, names: list[str]) -> np.ndarray:
    """Return the certainty (0 where absent) of each named attribute for each image, (N, len(names)) uint8."""
    rows = [dataset.meta_of(i).get("attributes", {}) for i in range(len(dataset))]
    return np.array([[row.get(name, 0) for name in names] for row in rows], dtype=np.uint8)

"""Readers of the fine-grained datasets of the two papers, behind the data specs of `vfm_core.data.open_dataset`.

=============  =====================================================================================================
``cub:``       CUB-200-2011: boxes, 15 part points, segmentations, attributes (`readers.cub`)
``cars:``      Stanford Cars: boxes (`readers.vehicles`)
``aircraft:``  FGVC-Aircraft: boxes, three label levels, copyright banner cut off (`readers.vehicles`)
``pet:``       Oxford-IIIT Pet: trimaps (`readers.pets`)
``dogs:``      Stanford Dogs: boxes (`readers.pets`)
``fishvista:`` Fish-Vista: trait segmentation (`readers.fishvista`)
``coco:``      COCO instances: boxes and masks (`readers.coco`)
``wds:``       WebDataset shards (`readers.wds`)
=============  =====================================================================================================

All give a `vfm_core.data.ImageDataset` whose samples carry, in pixels of the picture, what the format knows:
``box`` (x0, y0, x1, y1), ``mask`` (H, W) of the object, ``parts`` {name: (x, y)} and ``part_masks`` {name: (H, W)},
``trait_mask`` (H, W). Boxes are edges: an inclusive 1-based pixel range a..b becomes a - 1 .. b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from vfm_core.data import ImageDataset, register_data_family
from vfm_core.errors import UserError
from vfm_core.specs import Spec

__all__ = [
    "PART_RADIUS",
    "Box",
    "Discs",
    "LabelRegions",
    "around",
    "checked_box",
    "find_root",
    "numbers",
    "part_discs",
    "read_lines",
    "register_readers",
]

PART_RADIUS = 0.05
"""A part point stands for a disc of this fraction of the box's longer side."""

Box = tuple[float, float, float, float]
T = TypeVar("T")

_FAMILIES = {
    "cub": "cub:open_cub",
    "cars": "vehicles:open_cars",
    "aircraft": "vehicles:open_aircraft",
    "pet": "pets:open_pet",
    "dogs": "pets:open_dogs",
    "fishvista": "fishvista:open_fishvista",
    "coco": "coco:open_coco",
    "wds": "wds:open_wds",
}


def register_readers() -> None:
    """Make the formats above known to `vfm_core.data.open_dataset`; calling it again does nothing.

    A format's module is imported when its first dataset is opened.
    """
    for family, home in _FAMILIES.items():
        register_data_family(family, _OPENERS.setdefault(family, _later(home)))


_OPENERS: dict[str, Callable[..., ImageDataset]] = {}


def _later(home: str) -> Callable[..., ImageDataset]:
    def opener(spec: Spec, split: str | None = None) -> ImageDataset:
        module, _, name = home.partition(":")
        return getattr(import_module(f"finecam.readers.{module}"), name)(spec, split=split)

    return opener


# ------------------------------------------------------------------------------------------------------- text and boxes
def read_lines(path: Path, fields: int, *, rest: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and blank-separated fields of each line that is not empty.

    Parameters
    ----------
    path
        A text file of a dataset.
    fields
        How many fields a line must have at least; further ones are left out.
    rest
        The last field takes the rest of the line, blanks included.

    Raises
    ------
    UserError
        The file is missing or not text, or a line has too few fields; with file and line.
    """
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                found = line.split(maxsplit=fields - 1 if rest else -1)
                if len(found) >= fields:
                    found[-1] = found[-1].strip()
                    yield number, found[:fields]
                elif found:
                    given = repr(line.strip()[:80])
                    raise UserError(f"expected {fields} fields", where=f"{path}, line {number}", given=given)
    except FileNotFoundError:
        remedy = "check the dataset's folder"
        raise UserError("file of the dataset is missing", given=str(path), remedy=remedy) from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=f"{path}, after line {number}") from None
    except OSError as error:
        raise UserError(f"cannot read text ({error.strerror})", given=str(path)) from error


def numbers(kind: Callable[[str], T], texts: list[str], path: Path, line: int) -> list[T]:
    """Convert fields of a line to int or float.

    Raises
    ------
    UserError
        Naming file, line and the field that is not a finite number.
    """
    values = []
    for text in texts:
        try:
            value = kind(text)
            if not math.isfinite(value):  # type: ignore[arg-type]
                raise ValueError(text)
        except ValueError:
            raise UserError("not a number", where=f"{path}, line {line}", given=repr(text)) from None
        values.append(value)
    return values


def find_root(path: Path, marker: str, *below: str) -> Path:
    """Return the folder that holds ``marker``: ``path`` itself or one of its sub-folders named in ``below``.

    Raises
    ------
    UserError
        None does.
    """
    for root in (path, *(path / name for name in below)):
        if (root / marker).exists():
            return root
    raise UserError("not a folder of this dataset", given=str(path), remedy=f"it should hold {marker}")


def checked_box(x0: float, y0: float, x1: float, y1: float, where: str) -> Box:
    """Return the box.

    Raises
    ------
    UserError
        It has no area.
    """
    if not (x1 > x0 and y1 > y0):
        raise UserError("empty box", where=where, given=f"{x0:g}, {y0:g}, {x1:g}, {y1:g}")
    return float(x0), float(y0), float(x1), float(y1)


def around(boxes: Iterable[Box]) -> Box:
    """Return the smallest box around boxes."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


# ---------------------------------------------------------------------------------------------------- part masks
class Discs(Mapping[str, np.ndarray]):
    """Part points as masks, each drawn when it is asked for: 15 full-size masks per picture would cost megabytes.

    Parameters
    ----------
    points
        {part: (x, y)}, in pixels.
    size
        Width and height of the picture.
    radius
        Of the discs, in pixels; at least 1.
    """

    def __init__(self, points: Mapping[str, tuple[float, float]], size: tuple[int, int], radius: float) -> None:
        self.points, self.size, self.radius = dict(points), size, max(float(radius), 1.0)

    def __getitem__(self, name: str) -> np.ndarray:
        """Pixels (H, W) whose centre lies within the radius of the part's point."""
        x, y = self.points[name]
        width, height = self.size
        dx, dy = np.arange(width) + 0.5 - x, np.arange(height) + 0.5 - y
        return dx[None, :] ** 2 + dy[:, None] ** 2 <= self.radius**2

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


class LabelRegions(Mapping[str, np.ndarray]):
    """The regions of a label map as masks, each made when it is asked for.

    Parameters
    ----------
    labels
        (H, W) integers.
    names
        {label: name}; labels that do not occur are left out.
    """

    def __init__(self, labels: np.ndarray, names: Mapping[int, str]) -> None:
        self.labels = labels
        present = set(np.unique(labels).tolist())
        self.ids = {name: label for label, name in names.items() if label in present}

    def __getitem__(self, name: str) -> np.ndarray:
        """Pixels (H, W) with this name's label."""
        return self.labels == self.ids[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def part_discs(meta: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return ``part_masks`` and ``part_radius`` for a sample's ``parts``; nothing when it has none."""
    if not meta.get("parts"):
        return {}
    box = meta.get("box") or (0, 0, *size)
    discs = Discs(meta["parts"], size, PART_RADIUS * max(box[2] - box[0], box[3] - box[1]))
    return {"part_masks": discs, "part_radius": discs.radius}

"""``fishvista:``: Fish-Vista (Mehrab et al., CVPR 2025): museum fishes with pixel labels of nine traits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image
from vfm_core.data import ImageDataset, check_options, path_and_split, pick_splits
from vfm_core.data_sources import read_table
from vfm_core.errors import UserError, unknown_name
from vfm_core.images import is_image_file, read_label_map
from vfm_core.specs import Spec

from finecam.readers import LabelRegions

__all__ = ["FishVistaDataset", "open_fishvista"]

TASKS = ("segmentation", "classification", "identification")
TRAITS = ("adipose_fin", "pelvic_fin", "barbel", "multiple_dorsal_fin")


class FishVistaDataset(ImageDataset):
    """Fish-Vista; segmented samples carry ``part_masks`` {trait: mask} and ``trait_mask``, all traits together.

    Parameters
    ----------
    traits
        {pixel value: trait name}.
    """

    def __init__(self, *args: Any, traits: dict[int, str], **options: Any) -> None:
        super().__init__(*args, **options)
        self.traits = traits

    def annotate(self, i: int, image: Image.Image) -> dict[str, Any]:
        """Read the segmentation."""
        path = None if self.masks is None else self.masks[i]
        if path is None:
            return {}
        labels = read_label_map(path, image.size)
        unknown = sorted(set(labels.ravel().tolist()) - {0, *self.traits})
        if unknown:
            raise UserError(
                "pixel value without a trait", where=path, given=unknown, remedy="see seg_id_trait_map.json"
            )
        return {"part_masks": LabelRegions(labels, self.traits), "trait_mask": labels > 0}


def open_fishvista(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``fishvista:PATH[@train|@val|@test][?task=segmentation|classification|identification]``.

    PATH holds ``{task}_{split}.csv`` (columns ``filename``, ``standardized_species``, and ``family`` and trait columns
    where present), the pictures below ``Images/`` or ``AllImages/`` (in chunks or not), and the pixel labels
    ``segmentation_masks/images/*.png`` with ``segmentation_masks/seg_id_trait_map.json``. The species are those of all
    splits of the task. Trait columns of value 0 or 1 are passed on as ``traits``.

    Raises
    ------
    UserError
        A file is missing or malformed; with file and line.
    """
    check_options(spec, ("task",))
    path, split = path_and_split(spec, split)
    task = spec.options.get("task", "segmentation")
    if task not in TASKS:
        raise unknown_name("task", task, TASKS, where=str(spec))
    tables = {
        p.stem.removeprefix(f"{task}_"): p for p in sorted(path.glob(f"{task}_*.csv")) if p.stem != f"{task}_data"
    }
    if not tables:
        raise UserError("not a folder of this dataset", given=str(path), remedy=f"it should hold {task}_train.csv")
    chosen = pick_splits(tables, split, path)
    rows = {name: read_table(table, ("filename", "standardized_species"))[0] for name, table in tables.items()}
    species = sorted({row["standardized_species"] for part in rows.values() for _, row in part} - {""})
    index = {name: i for i, name in enumerate(species)}
    places = _picture_places(path)
    masks_folder = path / "segmentation_masks" / "images"
    files, labels, meta, ids = [], [], [], []
    for name in chosen:
        for line, row in rows[name]:
            if not row["filename"]:
                raise UserError("empty filename", where=f"{tables[name]}, line {line}")
            ids.append(row["filename"])
            files.append(places.get(row["filename"], path / "Images" / row["filename"]))
            labels.append(index.get(row["standardized_species"], -1))
            notes: dict[str, Any] = {"family": row["family"]} if row.get("family") else {}
            traits = {t: bool(float(row[t])) for t in TRAITS if row.get(t) in ("0", "1", "0.0", "1.0")}
            meta.append(notes | ({"traits": traits} if traits else {}))
    present = {p.name for p in masks_folder.glob("*.png")} if masks_folder.is_dir() else set()
    names = [f"{Path(i).stem}.png" for i in ids]
    map_file = path / "segmentation_masks" / "seg_id_trait_map.json"
    return FishVistaDataset(
        f"Fish-Vista {task}" + (f"@{split}" if split else ""),
        ids,
        labels,
        species,
        files=files,
        meta=meta,
        masks=[masks_folder / n if n in present else None for n in names],
        sources=[map_file] if present else [],
        traits=_traits(map_file) if present else {},
    )


def _picture_places(root: Path) -> dict[str, Path]:
    """Find every picture by its name, whether the chunks were merged or not."""
    found: dict[str, Path] = {}
    for folder in ("Images", "AllImages"):
        for where, below, files in os.walk(root / folder):
            below.sort()
            found |= {f: Path(where) / f for f in files if is_image_file(f)}
    return found


def _traits(path: Path) -> dict[int, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        traits = {int(k): str(v) for k, v in content.items()}
    except FileNotFoundError:
        raise UserError("file of the dataset is missing", given=str(path)) from None
    except json.JSONDecodeError as error:
        raise UserError(f"malformed JSON ({error.msg})", where=f"{path}, line {error.lineno}") from None
    except (ValueError, AttributeError):
        raise UserError("expected {number: trait}", where=path) from None
    return {k: v for k, v in traits.items() if k != 0}

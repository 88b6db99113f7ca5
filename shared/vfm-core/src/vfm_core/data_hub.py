"""``hf:``: a dataset of the Hugging Face hub, or a folder written by its ``save_to_disk``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vfm_core.data import check_options, path_and_split, pick_splits
from vfm_core.dataset import ImageDataset
from vfm_core.errors import UserError, unknown_name
from vfm_core.images import read_image
from vfm_core.specs import Spec

__all__ = ["HubDataset", "open_hf"]


class HubDataset(ImageDataset):
    """Rows of a ``datasets.Dataset``, decoded by the same rules as files.

    Parameters
    ----------
    name, ids, labels, classes
        As for :class:`ImageDataset`.
    rows : datasets.Dataset
        Its image column is cast to undecoded.
    column : str
        The image column.
    """

    def __init__(
        self, name: str, ids: list[str], labels: np.ndarray, classes: list[str], *, rows: Any, column: str
    ) -> None:
        super().__init__(name, ids, labels, classes)
        self.rows, self.column = rows, column

    def read(self, i: int) -> Image.Image:
        """Decode row ``i``."""
        cell = self.rows[i][self.column]
        where = f"{self.name}, row {i}"
        if not cell:
            raise UserError("empty image", where=where, remedy="drop the row")
        return read_image(cell["bytes"], name=where) if cell.get("bytes") else read_image(cell["path"])

    def identity(self) -> bytes:
        """Return the rows' own fingerprint, which datasets derives from content and transformations."""
        return super().identity() + json.dumps([self.rows._fingerprint, self.column]).encode()


def open_hf(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``hf:ORG/NAME[@SPLIT]`` or ``hf:PATH[@SPLIT]`` with the datasets library.

    Options: ``config``, ``revision``, and ``image`` and ``label`` to name columns. By default the image column is the
    first of the Image type, the label column the first of the ClassLabel type, else one named label.

    Raises
    ------
    UserError
        The library is missing, the dataset cannot be loaded, or a column or split is absent.
    """
    check_options(spec, ("config", "revision", "image", "label"))
    try:
        import datasets
    except ImportError:
        raise UserError("hf: needs the datasets library", remedy="pip install 'vfm-core[datasets]'") from None
    text = spec.name if spec.source is None else f"{spec.name}@{spec.source}"
    head = text.rpartition("@")[0]
    if any(path and Path(path).expanduser().is_dir() for path in (text, head)):
        path, split = path_and_split(spec, split)
        label, load = path.name, partial(datasets.load_from_disk, str(path))
    else:
        if spec.source and split and spec.source != split:
            raise UserError(
                "two splits asked for", where=str(spec), given=f"{spec.source} and {split}", remedy="drop one"
            )
        label, split = spec.name, spec.source or split
        config, revision = spec.options.get("config"), spec.options.get("revision")
        load = partial(datasets.load_dataset, spec.name, config, revision=revision)
    try:
        loaded = load()
    except Exception as error:  # the hub's client has its own families of errors for offline, gated, missing, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check the name and the connection, or give a folder written by save_to_disk"
        raise UserError(f"cannot load dataset ({reason})", given=text, remedy=remedy) from error
    if isinstance(loaded, dict):
        rows = datasets.concatenate_datasets([loaded[s] for s in pick_splits(loaded, split, text)])
    elif split not in (None, "all", str(loaded.split)):
        raise unknown_name("split", split, [str(loaded.split)] if loaded.split else [], where=text)
    else:
        rows = loaded
    return _from_rows(rows, label + (f"@{split}" if split else ""), spec)


def _from_rows(rows: Any, name: str, spec: Spec) -> HubDataset:
    import datasets

    features = rows.features
    images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    column = spec.options.get("image") or (images[0] if images else "")
    if column not in images:
        given = ", ".join(features)
        raise UserError(
            "no image column", where=name, given=given, remedy="name one that is of the Image type: ?image="
        )
    typed = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    usual = [c for c in ("label", "labels", "class", "species") if c in features]
    target = spec.options.get("label") or next(iter(typed + usual), None)
    if target is not None and target not in features:
        raise unknown_name("column", target, features, where=str(spec))
    labels = np.full(len(rows), -1, dtype=np.int64)
    classes: list[str] = []
    if target is not None:
        values = rows.select_columns([target])[:][target]
        if isinstance(features[target], datasets.ClassLabel):
            classes = list(features[target].names)
            labels = np.array([-1 if v is None else v for v in values], dtype=np.int64)
        else:
            known = sorted({v for v in values if v is not None})
            index = {v: i for i, v in enumerate(known)}
            classes = [str(v) for v in known]
            labels = np.array([index.get(v, -1) for v in values], dtype=np.int64)
    if not len(rows):
        raise UserError("no rows", where=name, remedy="choose another split")
    ids = [f"{i:08d}" for i in range(len(rows))]
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return HubDataset(name, ids, labels, classes, rows=rows, column=column)

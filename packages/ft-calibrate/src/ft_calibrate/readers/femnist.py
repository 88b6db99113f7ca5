"""``femnist:``: handwritten digits and letters by writer, in the JSON files of LEAF (Caldas et al. 2018).

HT takes single writers as target domains: their hand is the domain, and nobody writes all 62 characters often enough.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vfm_core.data import ImageDataset, pick_splits
from vfm_core.errors import UserError, unknown_name
from vfm_core.specs import Spec

from ft_calibrate.readers import choose_rows, open_root, read_json

__all__ = ["CLASSES", "Femnist", "open_femnist"]

CLASSES = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
"""Labels 0 to 61: digits, capitals, small letters."""

SIDE = 28


class Femnist(ImageDataset):
    """Characters held in memory, one byte a pixel (784 bytes each).

    Parameters
    ----------
    name : str
        For people.
    ids : sequence of str
        ``writer/number``, with the split before it where the files have one.
    labels : sequence of int
        0 to 61.
    pixels : ndarray of uint8, (N, 28, 28)
        Ink is dark, paper is white (255), as in the files.
    meta : sequence of mapping
        ``group``: the writer.
    sources : sequence of Path
        The JSON files.
    """

    def __init__(
        self,
        name: str,
        ids: Sequence[str],
        labels: np.ndarray,
        pixels: np.ndarray,
        meta: Sequence[Mapping[str, Any]],
        sources: Sequence[Path],
    ) -> None:
        super().__init__(name, ids, labels, CLASSES, meta=meta, sources=sources)
        self.pixels = pixels

    def read(self, i: int) -> Image.Image:
        """Return character ``i`` as an RGB picture, 28 x 28."""
        return Image.fromarray(self.pixels[i]).convert("RGB")


def open_femnist(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``femnist:ROOT[@train|@test|@all][?writer=ID[,ID...]]``.

    ROOT is a JSON file, or a folder with JSON files, or one with the folders ``train`` and ``test`` of them (also in
    ``ROOT/data``). Each file holds ``{"users": [..], "num_samples": [..], "user_data": {user: {"x": [[784 floats]],
    "y": [0..61]}}}``, pixels from 0 (ink) to 1 (paper). Files are read one at a time and each writer's pixels become
    bytes as soon as they are parsed. Without ``train`` and ``test`` folders, ``@train`` and ``@test`` split the chosen
    writers' characters 7:3 class by class.

    Returns
    -------
    Femnist
        62 classes; meta: ``group`` (writer).

    Raises
    ------
    UserError
        No such writer; a file that is cut off, lacks a field, or holds pixels or labels out of range; naming file,
        writer and field.
    """
    root, split, options = open_root(spec, split, ("writer",))
    writers = [w.strip() for w in options["writer"].split(",") if w.strip()] if "writer" in options else None
    tables = _tables(root)
    by_folder = set(tables) == {""}
    parts = [""] if by_folder else pick_splits(tables, split, root)
    ids: list[str] = []
    meta: list[dict[str, str]] = []
    labels: list[np.ndarray] = []
    pixels: list[np.ndarray] = []
    known: set[str] = set()
    for part in parts:
        count: dict[str, int] = {}
        for table in tables[part]:
            for user, x, y in _characters(table):
                known.add(user)
                if writers is not None and user not in writers:
                    continue
                start = count.get(user, 0)
                count[user] = start + len(y)
                prefix = f"{part}/{user}" if part else user
                ids += [f"{prefix}/{n}" for n in range(start, start + len(y))]
                meta += [{"group": user}] * len(y)
                labels.append(y)
                pixels.append(x)
    for writer in writers or ():
        if writer not in known:
            raise unknown_name("writer", writer, known, where=str(spec))
    if not ids:
        raise UserError("no characters", where=root, remedy="check ?writer= and the files")
    y_all, x_all = np.concatenate(labels), np.concatenate(pixels)
    rows = choose_rows(y_all, split, root) if by_folder else np.arange(len(ids))
    sources = [table for part in parts for table in tables[part]]
    name = "FEMNIST" + (f" {','.join(writers)}" if writers else "") + (f"@{split}" if split else "")
    return Femnist(name, [ids[i] for i in rows], y_all[rows], x_all[rows], [meta[i] for i in rows], sources)


def _tables(root: Path) -> dict[str, list[Path]]:
    """JSON files by split; the only key is ``""`` where there are no split folders."""
    if root.is_file():
        return {"": [root]}
    for place in (root, root / "data"):
        found = {part: sorted((place / part).glob("*.json")) for part in ("train", "test")}
        found = {part: files for part, files in found.items() if files}
        if found:
            return found
    for place in (root, root / "data", root / "data" / "all_data", root / "all_data"):
        files = sorted(place.glob("*.json")) if place.is_dir() else []
        if files:
            return {"": files}
    raise UserError(
        "no JSON files of LEAF", given=str(root), remedy="it should hold *.json, or train/ and test/ of them"
    )


def _characters(table: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Writer, pixels (n, 28, 28) uint8 and labels (n,) of everyone in a file."""
    content = read_json(table, _packed)
    if not isinstance(content, dict) or not isinstance(content.get("user_data"), dict):
        raise UserError("no field 'user_data'", where=table, remedy="give a JSON file of LEAF's FEMNIST")
    data, users = content["user_data"], content.get("users", list(content["user_data"]))
    numbers = content.get("num_samples")
    if numbers is not None and len(numbers) != len(users):
        given = f"{len(users)} users, {len(numbers)} numbers"
        raise UserError("users and num_samples differ in length", where=table, given=given, remedy="mend the file")
    found = []
    for i, user in enumerate(users):
        where = f"{table}, user_data[{user!r}]"
        if user not in data:
            raise UserError("writer has no data", where=where, remedy="remove the writer from users")
        packed = data[user]
        if isinstance(packed, dict):
            raise UserError("malformed writer", where=where, given=_arrays(packed), remedy="expected x and y of LEAF")
        x, y = packed
        if numbers is not None and numbers[i] != len(y):
            given = f"{len(y)} characters, num_samples says {numbers[i]}"
            raise UserError("number of characters differs", where=where, given=given, remedy="copy the file again")
        found.append((str(user), x, y))
    return found


def _packed(value: dict[str, Any]) -> Any:
    """Turn a writer's lists into arrays while the file is parsed: a float in a list costs 32 bytes, here one."""
    if "x" not in value or "y" not in value:
        return value
    found = _arrays(value)
    return value if isinstance(found, str) else found


def _arrays(value: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | str:
    """Pixels (n, 28, 28) uint8 and labels (n,) of a writer's record, or what is wrong with it."""
    missing = {"x", "y"} - set(value)
    if missing:
        return f"no {' and no '.join(sorted(missing))}"
    try:
        x = np.asarray(value["x"], dtype=np.float32)
        y = np.asarray(value["y"], dtype=np.float64)
    except (TypeError, ValueError):
        return "x or y holds something else than numbers, or rows of different length"
    if y.ndim != 1 or x.size != len(y) * SIDE * SIDE or (len(y) and x.shape[1:] != (SIDE * SIDE,)):
        return f"x has shape {x.shape}, y {y.shape}; expected (n, 784) and (n,)"
    if len(y) and not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        return f"pixels from {x.min():g} to {x.max():g}, expected 0 to 1"
    if len(y) and not ((y == np.floor(y)) & (y >= 0) & (y < len(CLASSES))).all():
        return f"labels from {y.min():g} to {y.max():g}, expected whole numbers 0 to {len(CLASSES) - 1}"
    pixels = np.rint(x.reshape(-1, SIDE, SIDE) * 255).astype(np.uint8)
    return pixels, y.astype(np.int64)

"""``wds:``: WebDataset tar shards as an indexed dataset.

A sample is the files of one shard that share a name up to the first dot of their last part: ``0001.jpg``, ``0001.cls``,
``0001.json``, ``0001.mask.png``. Shards are read by position (an uncompressed tar is its files in a row), so any
picture can be had at any time, and nothing is unpacked.
"""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from vfm_core.data import ImageDataset, check_options, path_and_split, pick_splits
from vfm_core.errors import UserError
from vfm_core.images import IMAGE_SUFFIXES, read_image, read_mask
from vfm_core.specs import Spec

from finecam.readers import checked_box

__all__ = ["ShardDataset", "open_wds"]

_NOTES = ("group", "time", "reference")


@dataclass
class Entry:
    """Where one sample lies: (offset, bytes) of its picture and mask in a shard, and what its small files say."""

    shard: Path
    key: str
    picture: tuple[int, int]
    mask: tuple[int, int] | None = None
    label: int | str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class ShardDataset(ImageDataset):
    """Pictures inside tar shards.

    Parameters
    ----------
    entries
        One per picture.
    """

    def __init__(self, name: str, labels: list[int], classes: list[str], entries: list[Entry]) -> None:
        several = len({e.shard.parent for e in entries}) > 1
        ids = [f"{e.shard.parent.name + '/' if several else ''}{e.shard.stem}/{e.key}" for e in entries]
        sources = sorted({e.shard for e in entries})
        super().__init__(name, ids, labels, classes, meta=[e.meta for e in entries], sources=sources)
        self.entries = entries

    def read(self, i: int) -> Image.Image:
        """Decode a picture."""
        entry = self.entries[i]
        return read_image(_bytes(entry.shard, *entry.picture), name=f"{entry.shard}: {entry.key}")

    def annotate(self, i: int, image: Image.Image) -> dict[str, Any]:
        """Decode the mask, where there is one."""
        entry = self.entries[i]
        if entry.mask is None:
            return {}
        return {"mask": read_mask(_bytes(entry.shard, *entry.mask), image.size, name=f"{entry.shard}: {entry.key}")}


def open_wds(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``wds:PATH[@SPLIT]``.

    PATH is a shard, a folder of shards, a folder with one sub-folder of shards per split, or a pattern with ``*`` or
    ``{0000..0031}`` (the latter needs the webdataset extra). Labels come from ``.cls`` (a number or a name) or from
    ``label`` in ``.json``, which may also hold ``box`` (x0, y0, x1, y1), ``group``, ``time`` and ``reference``. Names
    of numbered classes are read from ``classnames.txt``, one per line, beside the shards or one folder up.

    Raises
    ------
    UserError
        No shards, a damaged or compressed shard, a sample without a picture, labels that do not go together.
    """
    check_options(spec)
    shards, split = _shards(spec, split)
    entries = [entry for shard in shards for entry in _index(shard)]
    if not entries:
        raise UserError("no pictures in the shards", given=str(shards[0]))
    labels, classes = _labels(entries, shards[0].parent)
    return ShardDataset(shards[0].resolve().parent.name + (f"@{split}" if split else ""), labels, classes, entries)


def _shards(spec: Spec, split: str | None) -> tuple[list[Path], str | None]:
    if "{" in spec.name or "*" in spec.name:
        patterns = _expand(spec.name)
        shards = [p for pattern in patterns for p in _glob(pattern)]
        missing = next((p for p in shards if not p.exists()), None)
        if missing is not None or not shards:
            raise UserError("no such shard", where=str(spec), given=str(missing or spec.name))
        pick_splits([], split or spec.source, spec.name)
        return shards, None
    path, split = path_and_split(spec, split)
    if path.is_file():
        pick_splits([], split, path)
        return [path], None
    parts = {p.name: p for p in path.iterdir() if p.is_dir() and any(p.glob("*.tar"))}
    if any(path.glob("*.tar")):
        pick_splits([], split, path)
        return sorted(path.glob("*.tar")), None
    if not parts:
        raise UserError("no .tar shards", given=str(path), remedy="give a shard or a folder of shards")
    return [s for name in pick_splits(parts, split, path) for s in sorted(parts[name].glob("*.tar"))], split


def _glob(pattern: str) -> list[Path]:
    return sorted(map(Path, glob.glob(pattern))) if "*" in pattern else [Path(pattern)]  # noqa: PTH207 - absolute too


def _expand(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError:
        remedy = "pip install 'finecam[webdataset]', or write the pattern with *"
        raise UserError("patterns with braces need the webdataset extra", given=pattern, remedy=remedy) from None
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"malformed pattern ({error})", given=pattern) from None


def _index(shard: Path) -> Iterator[Entry]:
    """List the samples of a shard in their order; only headers, labels and notes are read."""
    try:
        with tarfile.open(shard, "r:") as tar:
            key, files = None, {}
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isfile() or not dot or not stem:
                    continue
                if key is not None and folder + slash + stem != key:
                    yield _entry(shard, key, files, tar)
                    files = {}
                key = folder + slash + stem
                files[suffix.lower()] = member
            if key is not None:
                yield _entry(shard, key, files, tar)
    except tarfile.ReadError as error:
        remedy = "shards must be whole, uncompressed tar files"
        raise UserError(f"cannot read shard ({error})", given=str(shard), remedy=remedy) from None


def _entry(shard: Path, key: str, files: dict[str, tarfile.TarInfo], tar: tarfile.TarFile) -> Entry:
    where = f"{shard}: {key}"
    places = {suffix: (m.offset_data, m.size) for suffix, m in files.items()}
    pictures = [s for s in places if f".{s}" in IMAGE_SUFFIXES] or [
        s for s in places if f".{s.rpartition('.')[2]}" in IMAGE_SUFFIXES and not s.startswith("mask.")
    ]
    if not pictures:
        raise UserError("sample without a picture", where=where, given=", ".join(sorted(files)))
    mask = next((places[s] for s in places if s.startswith("mask.")), None)
    entry = Entry(shard, key, places[pictures[0]], mask)
    notes: Any = {}
    if "json" in files:
        try:
            notes = json.loads(_text(tar, files["json"]))
        except ValueError as error:
            raise UserError(f"malformed JSON ({error})", where=where) from None
        if not isinstance(notes, dict):
            raise UserError("JSON is not an object", where=where)
    entry.meta = {k: notes[k] for k in _NOTES if k in notes}
    if "box" in notes:
        try:
            x0, y0, x1, y1 = (float(v) for v in notes["box"])
        except (TypeError, ValueError):
            raise UserError("box is not four numbers", where=where, given=notes["box"]) from None
        entry.meta["box"] = checked_box(x0, y0, x1, y1, where)
    label = _text(tar, files["cls"]).strip() if "cls" in files else notes.get("label")
    if label is not None and not isinstance(label, str | int):
        raise UserError("label is neither a number nor a name", where=where, given=label)
    entry.label = int(label) if isinstance(label, str) and label.isdigit() else label
    return entry


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    return file.read().decode("utf-8", errors="replace") if file is not None else ""


def _labels(entries: list[Entry], folder: Path) -> tuple[list[int], list[str]]:
    found = [e.label for e in entries]
    names = sorted({v for v in found if isinstance(v, str) and v})
    ids = [v for v in found if isinstance(v, int)]
    if names and ids:
        raise UserError(
            "labels are numbers in some samples and names in others", where=folder, given=f"{ids[0]}, {names[0]}"
        )
    if names or not ids:
        index = {name: i for i, name in enumerate(names)}
        return [index.get(v, -1) if isinstance(v, str) else -1 for v in found], names
    listing = next((p / "classnames.txt" for p in (folder, folder.parent) if (p / "classnames.txt").is_file()), None)
    classes = [str(i) for i in range(max(ids) + 1)]
    if listing is not None:
        classes = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
        if max(ids) >= len(classes):
            given = f"label {max(ids)} for {len(classes)} names"
            raise UserError("fewer class names than classes", where=listing, given=given)
    return [v if isinstance(v, int) else -1 for v in found], classes


def _bytes(shard: Path, offset: int, size: int) -> bytes:
    try:
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UserError(f"cannot read shard ({error.strerror})", given=str(shard)) from error

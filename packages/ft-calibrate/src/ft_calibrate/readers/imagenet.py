"""``imagenet-r:`` and ``imagenet-sketch:``: ImageNet-R (Hendrycks et al. 2021) and ImageNet-Sketch (Wang et al. 2019).

As in FTC both keep the 1000 ILSVRC classes: labels are ILSVRC indices 0 to 999, also for the 200 classes of ImageNet-R,
whose other 800 columns are the remaining classes. WordNet ids are mapped by timm's table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from vfm_core.data import ImageDataset, pick_splits
from vfm_core.errors import UserError, unknown_name
from vfm_core.specs import Spec

from ft_calibrate.class_names import IMAGENET_NAMES, imagenet_classes
from ft_calibrate.readers import choose_rows, images_below, open_root, subfolders
from ft_calibrate.readers.lists import read_list, resolve_base
from ft_calibrate.splits import per_class_split

__all__ = ["COUNTS", "open_imagenet_r", "open_imagenet_sketch"]

COUNTS = {"ImageNet-R": {"train": 24076, "test": 5924}, "ImageNet-Sketch": {"train": 40889, "test": 10000}}
"""Pictures in the published splits."""

SKETCH_TEST = 10
"""Test pictures per class of ImageNet-Sketch."""

_log = logging.getLogger(__name__)
Chooser = Callable[[list[int], str], "list[int]"]


def open_imagenet_r(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``imagenet-r:ROOT[@train|@test|@all][?names=wnid|description|short][&list=FILE]``.

    ROOT (or ``ROOT/imagenet-r``) holds ``<wnid>/<style>_<n>.jpg``. Each class is split 8:2, with file names sorted and
    shuffled with seed 0, the test part rounded down; that gives the published sizes but not the published files. A file
    of ``path label`` lines, labels being ILSVRC indices, takes the place of that split.

    Parameters
    ----------
    spec : Spec
        ``names``: what classes are called, see `ft_calibrate.class_names.imagenet_classes`; WordNet ids by default.
    split : str, optional
        The same as ``@SPLIT``; all pictures by default.

    Returns
    -------
    ImageDataset
        1000 classes in ILSVRC order; meta: ``style`` ("art", "cartoon", ...).

    Raises
    ------
    UserError
        A folder that is no WordNet id of ILSVRC, a class without pictures, a malformed list.
    """

    def choose(labels: list[int], part: str) -> list[int]:
        return choose_rows(labels, part, "ImageNet-R", train=0.8, round_up="train").tolist()

    return _open(spec, split, "ImageNet-R", ("imagenet-r",), choose)


def open_imagenet_sketch(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``imagenet-sketch:ROOT[@train|@test|@all][?names=...][&list=FILE]``.

    ROOT (or ``ROOT/imagenet-s``, ``ROOT/imagenet-sketch``, ``ROOT/sketch``) holds ``<wnid>/sketch_<n>.JPEG``. Ten
    pictures of each class, drawn with seed 0 from the sorted names, are the test split. Otherwise as
    `open_imagenet_r`.

    Raises
    ------
    UserError
        As `open_imagenet_r`; also a class with ten pictures or fewer.
    """

    def choose(labels: list[int], part: str) -> list[int]:
        return _sketch_rows(labels, part)

    return _open(spec, split, "ImageNet-Sketch", ("imagenet-s", "imagenet-sketch", "sketch"), choose)


def _sketch_rows(labels: list[int], part: str) -> list[int]:
    number: dict[int, int] = {}
    for label in labels:
        number[label] = number.get(label, 0) + 1
    few = next((label for label, n in number.items() if n <= SKETCH_TEST), None)
    if few is not None:
        given = f"{imagenet_classes()[few]} has {number[few]}"
        remedy = f"{SKETCH_TEST} test pictures a class leave none to train on; use @all"
        raise UserError("too few pictures in a class", where="ImageNet-Sketch", given=given, remedy=remedy)
    rows: list[int] = []
    start = 0
    for label, n in number.items():  # labels come class by class
        train, test = per_class_split([label] * n, train=(n - SKETCH_TEST) / n)
        rows += [start + int(i) for i in (train if part == "train" else test)]
        start += n
    return rows


def _open(spec: Spec, split: str | None, name: str, below: tuple[str, ...], choose: Chooser) -> ImageDataset:
    root, split, options = open_root(spec, split, ("names", "list"))
    kind = options.get("names", "wnid")
    if kind not in IMAGENET_NAMES:
        raise unknown_name("kind of names", kind, IMAGENET_NAMES, where="?names=")
    index = {wnid: i for i, wnid in enumerate(imagenet_classes())}
    folder = _class_root(root, below, index)
    if "list" in options:
        if split not in (None, "all"):
            raise UserError("a list has no splits", where=str(spec), given=f"@{split}", remedy="drop @ or ?list=")
        return _from_list(folder, root, options["list"], name, kind)
    ids: list[str] = []
    labels: list[int] = []
    for wnid in sorted(subfolders(folder), key=lambda w: index.get(w.lower(), -1)):
        if wnid.lower() not in index:
            remedy = "class folders are named by WordNet ids such as n01443537"
            raise UserError("folder is no ILSVRC class", where=folder, given=wnid, remedy=remedy)
        files = images_below(folder / wnid)
        if not files:
            raise UserError("class without images", where=folder, given=wnid, remedy="add images or remove the folder")
        ids += [f"{wnid}/{file}" for file in files]
        labels += [index[wnid.lower()]] * len(files)
    wanted = None if split is None else pick_splits(["train", "test"], split, str(spec))
    part = wanted[0] if wanted is not None and len(wanted) == 1 else None
    if part is not None:
        rows = choose(labels, part)
        ids, labels = [ids[i] for i in rows], [labels[i] for i in rows]
    expected = sum(n for key, n in COUNTS[name].items() if part in (None, key))
    if len(ids) != expected:
        _log.warning("%s has %d pictures, the published split has %d", folder, len(ids), expected)
    return _dataset(name + (f"@{split}" if split else ""), folder, ids, labels, kind)


def _class_root(root: Path, below: tuple[str, ...], index: dict[str, int]) -> Path:
    for place in (root, *(root / sub for sub in below)):
        if place.is_dir() and any(name.lower() in index for name in subfolders(place)):
            return place
    remedy = "it should hold one folder per class, named by WordNet ids such as n01443537"
    raise UserError("not a folder of this dataset", given=str(root), remedy=remedy)


def _from_list(folder: Path, root: Path, table: str, name: str, kind: str) -> ImageDataset:
    path = next((p for p in (root / table, Path(table).expanduser()) if p.is_file()), None)
    if path is None:
        raise UserError("no such image list", where="?list=", given=table, remedy="give a path, or one below the root")
    rows = read_list(path, 1000)
    base = resolve_base([p for _, p, _ in rows], [folder, folder.parent, root], path)
    wnids = imagenet_classes()
    for line, image, label in rows:
        below = Path(image).parent.name.lower()
        if below in wnids and below != wnids[label]:
            given = f"{image} {label} ({wnids[label]})"
            remedy = "labels are ILSVRC indices 0 to 999, also for ImageNet-R"
            raise UserError("label and class folder disagree", where=f"{path}, line {line}", given=given, remedy=remedy)
    ids = [image for _, image, _ in rows]
    return _dataset(f"{name} {path.stem}", base, ids, [label for _, _, label in rows], kind, [path])


def _dataset(
    name: str, base: Path, ids: list[str], labels: list[int], kind: str, sources: list[Path] | None = None
) -> ImageDataset:
    styles = [{"style": stem.rpartition("_")[0]} if "_" in (stem := Path(i).stem) else {} for i in ids]
    files = [base / i for i in ids]
    return ImageDataset(name, ids, labels, imagenet_classes(kind), files=files, meta=styles, sources=sources or ())

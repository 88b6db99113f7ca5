"""``office-home:``: Office-Home (Venkateswara et al. 2017), one of its four domains, in the set-up of FTC and HT.

Classes are the 65 names in the order of the label ids of the published image lists, not of the alphabet, so that labels
agree with the reference splits ``office-home:Ar`` and ``office-home:Rw`` (`ft_calibrate.splits.official_split`).
"""

from __future__ import annotations

import logging
from pathlib import Path

from vfm_core.data import ImageDataset
from vfm_core.errors import UserError, unknown_name
from vfm_core.specs import Spec

from ft_calibrate.class_names import ClassNames, plain_name
from ft_calibrate.readers import choose_rows, existing_folder, images_below, open_root, subfolders
from ft_calibrate.readers.lists import read_list, resolve_base
from ft_calibrate.splits import office_home_classes

__all__ = ["COUNTS", "DOMAINS", "open_office_home"]

DOMAINS = {"Ar": "Art", "Cl": "Clipart", "Pr": "Product", "Rw": "Real_World"}
"""Abbreviation -> folder; the original archive spells the last one ``Real World``."""

COUNTS = {
    "Ar": {"train": 1677, "test": 750},
    "Cl": {"train": 3035, "test": 1330},
    "Pr": {"train": 3078, "test": 1361},
    "Rw": {"train": 3022, "test": 1335},
}
"""Pictures in the published lists."""

_LIST_ENDINGS = {"train": "training", "test": "testing"}
_log = logging.getLogger(__name__)


def open_office_home(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``office-home:ROOT?domain=Cl[&lists=FOLDER|none]@train|@test|@all``.

    ROOT holds the folders ``Art``, ``Clipart``, ``Product`` and ``Real_World`` (or ``Real World``), each with a folder
    per class; spelling may differ in case, blanks, hyphens and underscores. The lists ``<Domain>_training.txt`` and
    ``<Domain>_testing.txt`` are looked for in ROOT, beside the domains in ``lists``, ``list`` or ``image_list``, or in
    the folder ``lists`` of the options. Without lists (or with ``lists=none``) each class is split 7:3, sorted by file
    name and shuffled with seed 0: train is the rounded-down 70 %. Those are not the published lists' pictures.

    Parameters
    ----------
    spec : Spec
        ``domain`` is Ar, Cl, Pr or Rw, or a folder's name; it can be left out when only one domain is there.
    split : str, optional
        The same as ``@SPLIT``. There is no default where it would join training and test pictures of the lists.

    Returns
    -------
    ImageDataset
        Always 65 classes; meta: ``domain`` (folder name) and ``split``.

    Raises
    ------
    UserError
        No such domain, class or list, malformed lines, or labels that contradict the class folder; naming file, line
        and remedy.
    """
    root, split, options = open_root(spec, split, ("domain", "lists"))
    short, folder = _domain(root, options.get("domain"))
    wanted = _canonical(split, spec)
    tables = _find_lists(root, folder, short, options.get("lists"))
    if tables and wanted is None:
        ways = ", ".join(f"@{part}" for part in (*tables, "all"))
        raise UserError("several splits and none chosen", where=str(spec), remedy=f"append one of {ways}")
    if tables:
        dataset = _from_lists(root, folder, short, tables, wanted)
    else:
        dataset = _from_folders(root, folder, short, wanted)
    expected = sum(n for part, n in COUNTS[short].items() if wanted in (None, "all", part))
    if len(dataset) != expected:
        _log.warning("%s has %d pictures, the published lists have %d", dataset.name, len(dataset), expected)
    return dataset


def _canonical(split: str | None, spec: Spec) -> str | None:
    if split is None:
        return None
    known = {"train": "train", "training": "train", "test": "test", "testing": "test", "all": "all"}
    if split.lower() not in known:
        raise unknown_name("split", split, ["train", "test", "all"], where=str(spec))
    return known[split.lower()]


def _domain(root: Path, wanted: str | None) -> tuple[str, Path]:
    present = {short: folder for short, name in DOMAINS.items() if (folder := existing_folder(root, [name]))}
    if not present:
        remedy = "it should hold Art, Clipart, Product and Real_World"
        raise UserError("not a folder of Office-Home", given=str(root), remedy=remedy)
    if wanted is None:
        if len(present) > 1:
            ways = ", ".join(f"?domain={short}" for short in present)
            raise UserError("several domains and none chosen", where=root, remedy=f"append one of {ways}")
        return next(iter(present.items()))
    names = {plain_name(short): short for short in DOMAINS} | {plain_name(v): short for short, v in DOMAINS.items()}
    if plain_name(wanted) not in names:
        raise unknown_name("domain", wanted, [*DOMAINS, *DOMAINS.values()], where="?domain=")
    short = names[plain_name(wanted)]
    if short not in present:
        remedy = f"{root} has {', '.join(p.name for p in present.values())}"
        raise UserError("domain folder is missing", given=str(root / DOMAINS[short]), remedy=remedy)
    return short, present[short]


def _find_lists(root: Path, folder: Path, short: str, option: str | None) -> dict[str, Path]:
    if option == "none":
        return {}
    places = [root, *(root / name for name in ("lists", "list", "image_list"))]
    if option is not None:
        places = [place for place in (root / option, Path(option).expanduser()) if place.is_dir()]
        if not places:
            raise UserError("no such folder of lists", where="?lists=", given=option, remedy="or write lists=none")
    for place in places:
        for name in dict.fromkeys((DOMAINS[short], folder.name, DOMAINS[short].replace("_", " "))):
            paths = {part: place / f"{name}_{ending}.txt" for part, ending in _LIST_ENDINGS.items()}
            there = {part: path for part, path in paths.items() if path.is_file()}
            if len(there) == 1:
                missing = next(path for part, path in paths.items() if part not in there)
                raise UserError("image list is missing", given=str(missing), remedy="add it, or write ?lists=none")
            if there:
                return there
    if option is not None:
        raise UserError(
            "no image lists", where=places[0], remedy=f"it should hold {DOMAINS[short]}_training.txt and _testing.txt"
        )
    return {}


def _from_lists(root: Path, folder: Path, short: str, tables: dict[str, Path], wanted: str | None) -> ImageDataset:
    classes = office_home_classes()
    names = ClassNames(classes, folder)
    ids: list[str] = []
    labels: list[int] = []
    meta: list[dict[str, str]] = []
    first: dict[str, Path] = {}
    chosen = {part: table for part, table in tables.items() if wanted in ("all", part)}
    for part, table in chosen.items():
        rows = read_list(table, len(classes))
        within = [_within(path, folder) for _, path, _ in rows]
        base = resolve_base(within, [folder, folder.parent / DOMAINS[short], root], table)
        for (line, path, label), relative in zip(rows, within, strict=True):
            where = f"{table}, line {line}"
            name = names.get(Path(relative).parent.name)
            if name is not None and name != classes[label]:
                raise UserError(
                    "label and class folder disagree",
                    where=where,
                    given=f"{path} {label} ({classes[label]})",
                    remedy="ids follow the reference order of the classes; ?lists=none reads the folders instead",
                )
            key = (base / relative).relative_to(root).as_posix()
            if key in first:
                raise UserError("image in both lists", where=where, given=path, remedy=f"remove it from {first[key]}")
            first[key] = table
            ids.append(key)
            labels.append(label)
            meta.append({"domain": folder.name, "split": part})
    name = f"Office-Home {DOMAINS[short]}@{wanted}"
    sources = list(chosen.values())
    return ImageDataset(name, ids, labels, classes, files=[root / i for i in ids], meta=meta, sources=sources)


def _within(path: str, folder: Path) -> str:
    """Cut ``[.../]Real World/`` off a listed path, however the domain is spelled there."""
    parts = path.strip("/").split("/")
    for i, part in enumerate(parts[:-1]):
        if plain_name(part) == plain_name(folder.name):
            return "/".join(parts[i + 1 :])
    return "/".join(parts)


def _from_folders(root: Path, folder: Path, short: str, wanted: str | None) -> ImageDataset:
    classes = office_home_classes()
    names = ClassNames(classes, folder)
    number = {name: i for i, name in enumerate(classes)}
    ids: list[str] = []
    labels: list[int] = []
    for below in sorted(subfolders(folder), key=lambda f: number[names.find(f)]):
        files = images_below(folder / below)
        if not files:
            raise UserError("class without images", where=folder, given=below, remedy="add images or remove the folder")
        ids += [f"{folder.name}/{below}/{file}" for file in files]
        labels += [number[names.find(below)]] * len(files)
    if not ids:
        raise UserError("no class folders", where=folder, remedy="it should hold a folder of images per class")
    rows = choose_rows(labels, wanted, folder)
    meta = [{"domain": folder.name, **({"split": wanted} if wanted in ("train", "test") else {})}] * len(rows)
    chosen = [ids[i] for i in rows]
    name = f"Office-Home {DOMAINS[short]}" + (f"@{wanted}" if wanted else "")
    return ImageDataset(name, chosen, [labels[i] for i in rows], classes, files=[root / i for i in chosen], meta=meta)

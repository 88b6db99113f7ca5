"""``vtab:``: tasks of the Visual Task Adaptation Benchmark (Zhai et al. 2019), with class names and prompts for CLIP.

FTC and HT adapt CLIP on VTAB tasks with a head made of the embeddings of class prompts, so a dataset here also says its
prompt templates (``dataset.templates``). Tasks that torchvision has are read through it; all of them, and the rest, can
be exported as folders of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vfm_core.data import ImageDataset, pick_splits
from vfm_core.errors import UserError
from vfm_core.images import read_image, to_rgb
from vfm_core.specs import Spec

from ft_calibrate.readers import choose_rows, images_below, open_root, subfolders
from ft_calibrate.readers.vtab_tasks import Task, check_templates, find_task

__all__ = ["VtabDataset", "open_vtab"]

_SPLIT_FOLDERS = ("train", "trainval", "val", "validation", "test")


class VtabDataset(ImageDataset):
    """Pictures of a task.

    Parameters
    ----------
    task : Task
        Which.
    templates : sequence of str
        Prompts, each with one ``{}``.
    parts : sequence of (dataset, positions), optional
        Torchvision datasets whose pictures are inside other files, and which of them; without it pictures are files.
    **options
        As for `vfm_core.data.ImageDataset`.
    """

    def __init__(
        self,
        *args: Any,
        task: Task,
        templates: Sequence[str],
        parts: Sequence[tuple[Any, np.ndarray]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.task, self.templates = task, tuple(templates)
        self._parts = [(data, int(i)) for data, rows in parts for i in rows] if parts is not None else None

    def read(self, i: int) -> Image.Image:
        """Decode picture ``i`` as RGB."""
        if self._parts is None:
            return read_image((self.files or ())[i])
        data, row = self._parts[i]
        return to_rgb(data[row][0])

    def prompts(self) -> list[list[str]]:
        """Return the prompts of each class, in class order: every template with the class name put in."""
        return [[template.replace("{}", name) for template in self.templates] for name in self.classes]


def open_vtab(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``vtab:ROOT?task=NAME[@train|@val|@test|@all]``.

    ROOT is the folder that torchvision calls ``root``; the task's files are unpacked there as torchvision would. Or
    ROOT holds a folder named after the task with pictures exported as ``[SPLIT/]CLASS/*``, which every task of VTAB
    can have; there ``classes.txt`` may list ``FOLDER<tab>NAME`` in class order and ``templates.txt`` the prompts.
    Nothing is downloaded. Tasks without published splits (Caltech101, SUN397, EuroSAT, exports without split folders)
    are split 7:3 class by class.

    Parameters
    ----------
    spec : Spec
        ``task``: a name of `ft_calibrate.readers.vtab_tasks.TASKS`, such as dtd, pets or resisc45.
    split : str, optional
        The same as ``@SPLIT``.

    Returns
    -------
    VtabDataset
        Class names read well in prompts; ``templates`` and ``prompts()`` say which.

    Raises
    ------
    UserError
        No task, a task whose files are missing (naming the folder and what to put there), incomplete or corrupt.
    """
    root, split, options = open_root(spec, split, ("task",))
    if "task" not in options:
        raise UserError("no task chosen", where=str(spec), remedy="append ?task=NAME, such as ?task=dtd")
    task = find_task(options["task"])
    if task.torchvision is not None and (root / task.home).exists():
        return _from_torchvision(task, root, split)
    for name in (task.name, *task.aliases):
        if (root / name).is_dir():
            return _from_folders(task, root / name, split)
    export = f"pictures as {root / task.name}/[SPLIT/]CLASS/*.png"
    if task.torchvision is None:
        raise UserError("task is not there", where=root, given=task.name, remedy=f"export its {export}")
    remedy = f"put there {task.holds}; or export its {export}"
    raise UserError("task is not there", given=str(root / task.home), remedy=remedy)


# ---------------------------------------------------------------------------------------------------------- torchvision
def _from_torchvision(task: Task, root: Path, split: str | None) -> VtabDataset:
    parts = pick_splits(task.splits, split, f"vtab task {task.name}") if task.splits else [""]
    loaded = [_load(task, root, part) for part in parts]
    classes = task.class_names(loaded[0])
    for part, data in zip(parts, loaded, strict=True):
        if task.class_names(data) != classes:
            remedy = f"put there all of {task.holds}"
            raise UserError("splits differ in their classes", where=root / task.home, given=part, remedy=remedy)
    labels = [task.labels_of(data) for data in loaded]
    for part, found in zip(parts, labels, strict=True):
        if len(found) and not (found.min() >= 0 and found.max() < len(classes)):
            given = f"{found.min() + task.first}..{found.max() + task.first}"
            raise UserError("label out of range", where=f"{root / task.home} {part}", given=given)
    joined = np.concatenate(labels)
    chosen = np.arange(len(joined)) if task.splits else _seven_three(task, loaded[0], joined, split, root)
    owner = np.concatenate([np.full(len(found), n) for n, found in enumerate(labels)])[chosen]
    row = np.concatenate([np.arange(len(found)) for found in labels])[chosen]
    paths = [task.files_of(data) for data in loaded]
    files = [path[r] for n, r in zip(owner, row, strict=True) if (path := paths[n]) is not None]
    ids = [
        f"{parts[n]}/{r:06d}" if paths[n] is None else files[i].relative_to(root).as_posix()
        for i, (n, r) in enumerate(zip(owner, row, strict=True))
    ]
    in_files = len(files) == len(ids)
    return VtabDataset(
        f"{task.name}" + (f"@{split}" if split else ""),
        ids,
        joined[chosen],
        classes,
        task=task,
        templates=task.templates,
        files=files if in_files else None,
        parts=None if in_files else [(data, row[owner == n]) for n, data in enumerate(loaded)],
        meta=[{"split": parts[n]} if parts[n] else {} for n in owner],
        sources=[] if in_files else _containers(task, root),
    )


def _load(task: Task, root: Path, part: str) -> Any:
    try:
        return task.load(root, part)
    except ImportError as error:
        raise UserError(
            f"a library is missing ({error})", where=f"vtab task {task.name}", remedy="install it"
        ) from None
    except Exception as error:  # torchvision raises RuntimeError, and whatever parsing a damaged file leads to
        needs_library = "h5py" in str(error)
        what = "h5py is missing" if needs_library else f"incomplete or corrupt files ({_short(error)})"
        remedy = "pip install h5py" if needs_library else f"put there {task.holds}"
        raise UserError(what, where=f"{root / task.home}", given=f"task {task.name} {part}", remedy=remedy) from error


def _short(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    text = str(error) or type(error).__name__
    return text.split(". You can use download", maxsplit=1)[0][:120]


def _seven_three(task: Task, data: Any, labels: np.ndarray, split: str | None, root: Path) -> np.ndarray:
    """Positions of the split by sorted file names: torchvision's own order may be that of the file system."""
    files = task.files_of(data) or []
    order = np.asarray(sorted(range(len(files)), key=lambda i: files[i].as_posix()), dtype=np.intp)
    return order[choose_rows(labels[order], split, root / task.home)]


def _containers(task: Task, root: Path) -> list[Path]:
    home = root / task.home
    found = home.iterdir() if home.is_dir() else root.glob("*_32x32.mat")
    return sorted(path for path in found if path.is_file())


# -------------------------------------------------------------------------------------------------------------- exports
def _from_folders(task: Task, folder: Path, split: str | None) -> VtabDataset:
    tops = subfolders(folder)
    named = [top for top in tops if top.lower() in _SPLIT_FOLDERS]
    has_splits = bool(named) and len(named) == len(tops)
    parts = pick_splits(named, split, folder) if has_splits else [""]
    present = sorted({c for part in (named if has_splits else [""]) for c in subfolders(folder / part)})
    order, names = _class_list(folder, present)
    ids: list[str] = []
    labels: list[int] = []
    meta: list[dict[str, str]] = []
    for part in parts:
        for label, below in enumerate(order):
            place = folder / part / below
            files = images_below(place) if place.is_dir() else []
            ids += [Path(part, below, file).as_posix() for file in files]
            labels += [label] * len(files)
            meta += [{"split": part} if part else {}] * len(files)
    if not ids:
        remedy = "export pictures as [SPLIT/]CLASS/*.png"
        raise UserError("no pictures of the task", where=folder, given=task.name, remedy=remedy)
    rows = np.arange(len(ids)) if has_splits else choose_rows(labels, split, folder)
    templates = task.templates
    written = folder / "templates.txt"
    if written.is_file():
        templates = check_templates(_lines(written), written)
    chosen = [ids[i] for i in rows]
    sources = [path for path in (folder / "classes.txt", written) if path.is_file()]
    return VtabDataset(
        f"{task.name}" + (f"@{split}" if split else ""),
        chosen,
        [labels[i] for i in rows],
        names,
        task=task,
        templates=templates,
        files=[folder / i for i in chosen],
        meta=[meta[i] for i in rows],
        sources=sources,
    )


def _class_list(folder: Path, present: list[str]) -> tuple[list[str], list[str]]:
    """Class folders in class order, and their names for prompts."""
    listed = folder / "classes.txt"
    if not listed.is_file():
        return present, [name.replace("_", " ") for name in present]
    order: list[str] = []
    names: list[str] = []
    for line in _lines(listed):
        below, _, name = line.partition("\t")
        order.append(below.strip())
        names.append(name.strip() or below.strip().replace("_", " "))
    for found in (order, names):
        twice = next((name for name in found if found.count(name) > 1), None)
        if twice is not None:
            raise UserError("class given twice", where=listed, given=twice, remedy="keep one of them")
    missing = [below for below in present if below not in order]
    if missing:
        remedy = "add a line FOLDER<tab>NAME"
        raise UserError("class folder is not listed", where=listed, given=missing[0], remedy=remedy)
    return order, names


def _lines(path: Path) -> list[str]:
    try:
        return [line.rstrip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=path, remedy="save it as UTF-8") from None

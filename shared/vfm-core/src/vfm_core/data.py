"""Labelled and unlabelled image data behind one spec grammar, read one picture at a time.

``open_dataset("folder:photos@train")``, ``"csv:birds.csv"``, ``"hf:ORG/NAME@validation"``, ``"tinyworld:birds?n=320"``
and a bare path all give an :class:`ImageDataset`. Packages add families with :func:`register_data_family` or the
entry-point group ``vfm_core.data``. :func:`loader` streams batches and survives unreadable files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path

from vfm_core.dataset import ImageDataset, Sample, Subset
from vfm_core.errors import UserError, unknown_name
from vfm_core.loading import loader
from vfm_core.specs import Spec, parse_spec

__all__ = [
    "ImageDataset",
    "Sample",
    "Subset",
    "check_options",
    "loader",
    "open_dataset",
    "path_and_split",
    "pick_splits",
    "register_data_family",
]

_SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}

Opener = Callable[..., ImageDataset]
_OPENERS: dict[str, Opener] = {}


def register_data_family(name: str, opener: Opener) -> None:
    """Add a data family, so that ``open_dataset("name:...")`` works.

    Parameters
    ----------
    name : str
        What stands before the colon.
    opener : callable
        ``opener(spec: Spec, split: str | None = None) -> ImageDataset``.

    Raises
    ------
    ValueError
        Another opener holds the name.
    """
    held = _families(load=False).get(name)
    if held is not None and held is not opener:
        raise ValueError(f"data family {name!r} is taken by {held!r}")
    _OPENERS[name] = opener


def open_dataset(spec: str | os.PathLike[str] | Spec, *, split: str | None = None) -> ImageDataset:
    """Open data by its spec.

    Parameters
    ----------
    spec : str, path or Spec
        ``folder:PATH``, ``csv:PATH``, ``hf:ORG/NAME`` or ``hf:PATH``, ``tinyworld:NAME``, or a bare path (a folder, or
        a ``.csv`` file). ``@SPLIT`` at the end chooses a split, ``@all`` joins all of them.
    split : str, optional
        The same as ``@SPLIT``. ``val``, ``valid`` and ``validation`` mean the same.

    Returns
    -------
    ImageDataset

    Raises
    ------
    UserError
        Unknown family, missing path, a split that is absent, or several splits and none chosen.
    """
    if not isinstance(spec, Spec):
        spec = _parse_data_spec(os.fspath(spec).strip())
    opener = _families()[spec.family]
    return opener(spec, split=split)


def _parse_data_spec(text: str) -> Spec:
    family, colon, rest = text.partition(":")
    if colon and family in _families():
        return parse_spec(text)
    head, at, tail = text.rpartition("@")
    for path, source in ((text, None), (head, tail)) if at else ((text, None),):
        if path and Path(path).expanduser().exists():
            return Spec("csv" if path.lower().endswith(".csv") else "folder", path, source)
    if colon and rest and len(family) > 1 and "/" not in family:
        raise unknown_name("data family", family, _families())
    remedy = "give a folder of images, or a data spec such as folder:PATH, csv:PATH or tinyworld:birds"
    raise UserError("no such folder or file", given=repr(text), remedy=remedy)


def _families(load: bool = True) -> dict[str, Opener]:
    from vfm_core import data_hub, data_sources

    found: dict[str, Opener] = {
        "folder": data_sources.open_folder,
        "dir": data_sources.open_folder,
        "csv": data_sources.open_csv,
        "hf": data_hub.open_hf,
    }
    if load:
        for point in entry_points(group="vfm_core.data"):
            found.setdefault(point.name, lambda spec, split=None, point=point: point.load()(spec, split=split))
    return {**found, **_OPENERS}


def path_and_split(spec: Spec, split: str | None = None) -> tuple[Path, str | None]:
    """Read ``PATH[@SPLIT]`` from a spec, for openers whose name is a path.

    Parameters
    ----------
    spec : Spec
        A path that exists wins over reading ``@`` as the mark of a split.
    split : str, optional
        What the caller asked for besides the spec.

    Returns
    -------
    path : Path
        Exists.
    split : str or None

    Raises
    ------
    UserError
        No such path, or two different splits.
    """
    text = spec.name if spec.source is None else f"{spec.name}@{spec.source}"
    path, source = Path(text).expanduser(), None
    if not path.exists():
        head, at, tail = text.rpartition("@")
        if not at or not Path(head).expanduser().exists():
            raise UserError("no such folder or file", given=head or text, remedy="check the path")
        path, source = Path(head).expanduser(), tail
    if source and split and _canonical(source) != _canonical(split):
        raise UserError("two splits asked for", where=str(spec), given=f"{source} and {split}", remedy="drop one")
    return path, source or split


def pick_splits(available: Iterable[str], wanted: str | None, where: str | Path) -> list[str]:
    """Choose among the splits that a dataset has.

    Parameters
    ----------
    available : iterable of str
        Names as the dataset spells them.
    wanted : str or None
        One of them, another spelling of it (``val``, ``valid``, ``validation``), or ``"all"``.
    where : str or Path
        For the error.

    Returns
    -------
    list of str
        The names to join, sorted.

    Raises
    ------
    UserError
        Absent, or several and none chosen: joining them silently would mix test data into training.
    """
    names = sorted(set(available))
    if wanted is None:
        if len(names) > 1:
            ways = ", ".join(f"@{name}" for name in [*names, "all"])
            raise UserError("several splits and none chosen", where=where, remedy=f"append one of {ways}")
        return names
    if wanted in names:
        return [wanted]
    if wanted == "all":
        return names
    found = [n for n in names if _canonical(n) == _canonical(wanted)]
    if not found:
        raise unknown_name("split", wanted, names, where=where)
    return found


def check_options(spec: Spec, known: Iterable[str] = ()) -> None:
    """Refuse options that an opener does not have.

    Raises
    ------
    UserError
        Naming the closest known option.
    """
    for option in spec.options:
        if option not in known:
            raise unknown_name("option", option, known, where=str(spec))


def _canonical(split: str) -> str:
    return _SPLIT_NAMES.get(split.lower(), split.lower())

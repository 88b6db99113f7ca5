"""Class names as people spell them, and the names of the 1000 ImageNet classes (from timm's tables, no download)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from vfm_core.errors import unknown_name

__all__ = [
    "IMAGENET_NAMES",
    "ClassNames",
    "distinct_names",
    "imagenet_classes",
    "imagenet_translation",
    "match_columns",
    "plain_name",
]

IMAGENET_NAMES = ("wnid", "description", "short")


class ClassNames:
    """Finds class names as people spell them: exactly, or regardless of case, blanks, hyphens and underscores.

    Parameters
    ----------
    classes : sequence of str
        The names as they should be.
    where : str or Path
        For errors.
    """

    def __init__(self, classes: Sequence[str], where: str | Path) -> None:
        self.classes, self.where = classes, where
        self.exact = set(classes)
        self.plain: dict[str, list[str]] = {}
        for name in classes:
            self.plain.setdefault(plain_name(name), []).append(name)

    def get(self, name: str | int) -> str | None:
        """Return the name as it should be; None when there is none, or several that differ in spelling only."""
        text = str(name)
        if text in self.exact:
            return text
        near = self.plain.get(plain_name(text), ())
        return near[0] if len(near) == 1 else None

    def find(self, name: str | int) -> str:
        """Return the name as it should be, also for a column number that is no name.

        Raises
        ------
        UserError
            Unknown; the closest names are suggested.
        """
        found = self.get(name)
        if found is not None:
            return found
        text = str(name)
        if text.isdecimal() and int(text) < len(self.classes):
            return self.classes[int(text)]
        raise unknown_name("class", text, self.classes, where=self.where)


def plain_name(name: str) -> str:
    """Return a name without case, blanks, hyphens and underscores: ``"Real World"`` and ``"real_world"`` agree."""
    return re.sub(r"[\s_\-]+", "", name).casefold()


@cache
def imagenet_classes(names: str = "wnid") -> tuple[str, ...]:
    """Names of the 1000 ILSVRC classes in the order of their indices; all different.

    Parameters
    ----------
    names : {"wnid", "description", "short"}
        WordNet ids ("n01440764"), the descriptions of timm and transformers ("tench, Tinca tinca"), or their first
        words ("tench"), which read well in prompts. Where two classes share a name ("crane", "maillot"), the WordNet id
        is appended to both.

    Raises
    ------
    UserError
        Another kind of names.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    wnids = tuple(info.label_names())
    if names == "wnid":
        return wnids
    if names not in IMAGENET_NAMES:
        raise unknown_name("kind of ImageNet names", names, IMAGENET_NAMES)
    found = [info.index_to_description(i) for i in range(len(wnids))]
    if names == "short":
        found = [name.split(",", maxsplit=1)[0] for name in found]
    count = Counter(found)
    return tuple(name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(found, wnids, strict=True))


def imagenet_translation(given: Sequence[str]) -> dict[str, str]:
    """Find the ImageNet classes in another list of them.

    Parameters
    ----------
    given : sequence of str
        Names of the kinds of `imagenet_classes`; or 1000 names of any kind in the order of the ILSVRC indices.

    Returns
    -------
    dict
        WordNet id -> the name in ``given``, for the classes that were found.
    """
    kinds = [imagenet_classes(kind) for kind in IMAGENET_NAMES]
    names = ClassNames(given, "ImageNet classes")
    found: dict[str, str] = {}
    for words in zip(*kinds, strict=True):
        name = next((name for name in map(names.get, words) if name is not None), None)
        if name is not None:
            found[words[0]] = name
    if len(given) == 1000 and len(set(found.values())) < 1000:
        return dict(zip(kinds[0], given, strict=True))
    return found


def match_columns(classes: Sequence[str], columns: Sequence[str]) -> list[int | None]:
    """Find each of some class names among the names of a head's columns.

    Exact names first, then ImageNet classes under their other names and WordNet ids (which also finds the two classes
    called "crane" in a list of all 1000), then regardless of case, blanks, hyphens and underscores, last what stands
    before the column's first comma (``tench`` finds ``tench, Tinca tinca``).

    Parameters
    ----------
    classes : sequence of str
        What to find.
    columns : sequence of str
        Names of the K columns; a name may repeat only in a list of the 1000 ImageNet classes.

    Returns
    -------
    list of int or None
        Column of each class; None where there is none.
    """
    if list(classes) == list(columns):
        return list(range(len(columns)))
    index = {name: i for i, name in enumerate(columns)}
    exact = index if len(index) == len(columns) else {}  # where names repeat, the place in ImageNet says more
    if all(name in exact for name in classes):
        return [exact[name] for name in classes]
    column_of = {place: i for i, place in enumerate(_imagenet_places(columns)) if place is not None}
    plain = _unique(map(plain_name, columns))
    first = _unique(plain_name(name.split(",", maxsplit=1)[0]) for name in columns)
    found: list[int | None] = []
    for name, place in zip(classes, _imagenet_places(classes), strict=True):
        imagenet = None if place is None else column_of.get(place)
        ways = (exact.get(name), imagenet, index.get(name), plain.get(plain_name(name)), first.get(plain_name(name)))
        found.append(next((column for column in ways if column is not None), None))
    return found


def _unique(names: Iterable[str]) -> dict[str, int]:
    """Positions of the names that occur once."""
    listed = list(names)
    count = Counter(listed)
    return {name: i for i, name in enumerate(listed) if count[name] == 1}


def distinct_names(names: Sequence[str]) -> list[str]:
    """Tell class names apart that repeat, as "crane" does in most models' lists of the ImageNet classes.

    Parameters
    ----------
    names : sequence of str
        Names of the K columns.

    Returns
    -------
    list of str
        The same, but for repeated ones: these get their WordNet id, as in `imagenet_classes`, in a list of the 1000
        ImageNet classes, and their column number in any other, in brackets.
    """
    count = Counter(names)
    if max(count.values(), default=0) < 2:
        return list(names)
    ordered = _imagenet_places(names) == list(range(1000))
    marks = imagenet_classes() if ordered else [str(i) for i in range(len(names))]
    return [name if count[name] == 1 else f"{name} ({mark})" for name, mark in zip(names, marks, strict=True)]


def _imagenet_places(names: Sequence[str]) -> list[int | None]:
    """ILSVRC indices of names; those of a list of all 1000 in order, even where a name repeats ("crane")."""
    place = {name: i for kind in IMAGENET_NAMES for i, name in enumerate(imagenet_classes(kind))}
    plain: dict[str, set[int]] = {}
    for name, i in place.items():
        plain.setdefault(plain_name(name), set()).add(i)
    loose = {name: min(ids) for name, ids in plain.items() if len(ids) == 1}  # a cardigan is no Cardigan (a dog)
    found = [place.get(name, loose.get(plain_name(name))) for name in names]
    if len(names) == 1000 and sum(p == i for i, p in enumerate(found)) > 900:
        return list(range(1000))
    return found

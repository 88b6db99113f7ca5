"""What a split of a class list is, and its file ``splits.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vfm_core.errors import UserError, unknown_name
from vfm_core.files import write_json

from ft_calibrate.class_names import ClassNames, imagenet_classes, imagenet_translation

__all__ = ["Split", "read_split", "write_split"]


@dataclass(frozen=True)
class Split:
    """A division of a class list.

    Attributes
    ----------
    classes : tuple of str
        All K class names, in the order of the columns.
    seen, absent : tuple of str
        S and U: names from ``classes``, no name twice or in both. Classes in neither are the remaining ones.
    name : str
        For people, such as ``"office-home:Ar"``.
    kind : str
        How it was made: one of `KINDS`.
    seed : int or None
        Of a random choice.

    Raises
    ------
    UserError
        A name twice, in both groups or not among the classes; no seen class.
    """

    classes: tuple[str, ...]
    seen: tuple[str, ...]
    absent: tuple[str, ...]
    name: str = "split"
    kind: str = "file"
    seed: int | None = field(default=None)

    def __post_init__(self) -> None:
        for what in ("classes", "seen", "absent"):
            names = tuple(str(name) for name in getattr(self, what))
            object.__setattr__(self, what, names)
            if len(set(names)) != len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError("class given twice", where=f"{what} of split {self.name}", given=repr(twice))
        known = set(self.classes)
        for what in ("seen", "absent"):
            for name in getattr(self, what):
                if name not in known:
                    raise unknown_name("class", name, self.classes, where=f"{what} of split {self.name}")
        both = sorted(set(self.seen) & set(self.absent))
        if both:
            raise UserError(
                "classes both seen and absent",
                where=f"split {self.name}",
                given=", ".join(both[:5]),
                remedy="keep each in one list",
            )
        if not self.seen:
            raise UserError("no seen class", where=f"split {self.name}", remedy="name at least one class")

    @property
    def remaining(self) -> tuple[str, ...]:
        """R: the classes that are neither seen nor absent, in column order."""
        named = {*self.seen, *self.absent}
        return tuple(name for name in self.classes if name not in named)

    @property
    def columns(self) -> dict[str, list[int]]:
        """Column numbers of ``seen``, ``absent`` and ``remaining``, each ascending."""
        index = {name: i for i, name in enumerate(self.classes)}
        return {g: sorted(index[name] for name in getattr(self, g)) for g in ("seen", "absent", "remaining")}

    def for_classes(self, classes: Sequence[str], where: str | Path | None = None) -> Split:
        """Return the same split in the words of another class list, such as a model's.

        Parameters
        ----------
        classes : sequence of str
            The K' names to use. A name is found as it is spelled, or else regardless of case and of blanks, hyphens
            and underscores where that leaves one candidate. ImageNet classes are found under each of their names,
            or, in a list of 1000 other names, by their position.
        where : str or Path, optional
            For the error.

        Returns
        -------
        Split
            Over ``classes``; those that this split does not name are remaining.

        Raises
        ------
        UserError
            A seen or absent class that the list lacks.
        """
        given = tuple(str(name) for name in classes)
        if given == self.classes:
            return self
        found = ClassNames(given, where if where is not None else f"classes for split {self.name}")
        words: dict[str, str] = imagenet_translation(given) if self.classes == imagenet_classes() else {}
        seen, absent = ([words.get(name, name) for name in part] for part in (self.seen, self.absent))
        return replace(self, classes=given, seen=tuple(map(found.find, seen)), absent=tuple(map(found.find, absent)))

    def to_dict(self) -> dict[str, Any]:
        """What `write_split` writes."""
        facts: dict[str, Any] = {"version": 1, "name": self.name, "kind": self.kind, "seed": self.seed}
        return facts | {g: list(getattr(self, g)) for g in ("classes", "seen", "absent", "remaining")}


# ---------------------------------------------------------------------------------------------------------------- files
def write_split(split: Split, path: str | Path) -> None:
    """Write a split as JSON, atomically: ``version, name, kind, seed, classes, seen, absent, remaining``."""
    write_json(path, split.to_dict())


def read_split(path: str | Path, classes: Sequence[str] | None = None) -> Split:
    """Read seen (and absent) classes from a file.

    Parameters
    ----------
    path : path
        ``.json``: what `write_split` wrote; or an object with ``seen`` and where wanted ``absent`` and ``classes``; or
        a list of the seen classes. Anything else is text with one seen class a line; blank lines and what follows
        ``#`` at the start of a line do not count. Classes are names or, where no class has that name, column numbers.
    classes : sequence of str, optional
        The class list that the names belong to; needed where the file has none. Where both have one, the names are
        looked up in this one (see `Split.for_classes`).

    Returns
    -------
    Split
        Classes not named as seen are absent, unless the file says which are absent.

    Raises
    ------
    UserError
        Missing, malformed, an unknown class, no class list; with the file and the line or field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=path, remedy="save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read the file of classes ({error.strerror})", given=str(path)) from None
    if path.suffix.lower() == ".json":
        facts = _split_facts(text, path)
    else:
        lines = [line.strip() for line in text.splitlines()]
        facts = {"seen": [line for line in lines if line and not line.startswith("#")]}
    own = facts.get("classes")
    if own is None and classes is None:
        raise UserError("no list of all classes", where=path, remedy="name the data, the logits or the class list")
    names = tuple(str(c) for c in (own if own is not None else classes or ()))
    found = ClassNames(names, path)
    seen = [found.find(c) for c in facts["seen"]]
    taken = set(seen)
    absent = facts.get("absent")
    rest = [c for c in names if c not in taken] if absent is None else [found.find(c) for c in absent]
    name, kind = str(facts.get("name") or path.stem), str(facts.get("kind") or "file")
    split = Split(names, tuple(seen), tuple(rest), name, kind, facts.get("seed"))
    return split if classes is None else split.for_classes(classes, path)


def _split_facts(text: str, path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"malformed JSON ({error.msg})", where=f"{path}, line {error.lineno}") from None
    if isinstance(facts, list):
        facts = {"seen": facts}
    if not isinstance(facts, dict) or "seen" not in facts:
        raise UserError("no field 'seen'", where=path, remedy='write {"seen": [...], "absent": [...]} or a list')
    for key in ("classes", "seen", "absent"):
        values = facts.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or not all(isinstance(v, str | int) for v in values):
            given = json.dumps(values)[:60]
            raise UserError("not a list of class names", where=f"{path}, field {key}", given=given)
    return facts

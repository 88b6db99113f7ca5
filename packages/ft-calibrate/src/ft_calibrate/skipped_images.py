"""Pictures that could not be read, and why: collected where they are met, kept in ``skipped.csv`` (ours).

One collector belongs to one unit of work. It writes every new picture down at once, so that a run which is killed and
resumed still knows what its finished units left out; the run's own list is put together from those of its units.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from vfm_core.errors import UserError
from vfm_core.files import atomic_write
from vfm_core.loading import OnError

__all__ = ["SKIPPED", "SkippedImages", "merge_skipped", "read_skipped", "write_skipped"]

log = logging.getLogger(__name__)

SKIPPED = "skipped.csv"
_HEADER = ("id", "reason")


class SkippedImages:
    """Collects unreadable pictures, each once: the ``on_error`` of `fine_tune` and `predict_table`.

    Parameters
    ----------
    path : Path, optional
        A CSV file that is read first and that every new picture is appended to.

    Attributes
    ----------
    items : dict of str to str
        Picture -> reason.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.items: dict[str, str] = {} if path is None else read_skipped(path)

    def __call__(self, index: int, name: str, error: UserError) -> None:
        """Note one picture."""
        if name in self.items:
            return
        self.items[name] = error.what
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([*([_HEADER] if file.tell() == 0 else []), (name, error.what)])

    def of(self, data: str) -> OnError:
        """The same collector for another data set, whose pictures may have the same names: ``data: id``."""
        return lambda index, name, error: self(index, f"{data}: {name}", error)


def read_skipped(path: Path) -> dict[str, str]:
    """Picture -> reason, as a collector or `write_skipped` wrote it; nothing where there is no file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [(line[0], line[1]) for line in csv.reader(file) if len(line) == 2 and tuple(line) != _HEADER]
    except FileNotFoundError:
        return {}
    return dict(lines)


def merge_skipped(paths: Iterable[Path]) -> dict[str, str]:
    """The lists of several units as one, in the order of their names."""
    found: dict[str, str] = {}
    for path in paths:
        found |= read_skipped(path)
    return dict(sorted(found.items()))


def write_skipped(path: Path, items: Mapping[str, str]) -> None:
    """Write a run's list, with a warning; no file when all pictures could be read."""
    if not items:
        path.unlink(missing_ok=True)
        return
    log.warning("%d unreadable pictures are listed in %s", len(items), path)
    with atomic_write(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([_HEADER, *items.items()])

"""Image lists of the published code: one ``relative/path.jpg LABEL`` a line, where the path may hold blanks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vfm_core.errors import UserError

__all__ = ["read_list", "resolve_base"]


def read_list(table: Path, num_classes: int) -> list[tuple[int, str, int]]:
    """Read an image list.

    Parameters
    ----------
    table : Path
        UTF-8 text; the label is the last blank-separated field of a line. Empty lines do not count.
    num_classes : int
        Labels are 0 to ``num_classes`` - 1.

    Returns
    -------
    list of (line number, path, label)
        Paths as written, with forward slashes.

    Raises
    ------
    UserError
        Missing or not text, a line without path or label, a label out of range, a path twice, no line at all; with
        file and line.
    """
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=table, remedy="give a list of 'path label' lines") from None
    except OSError as error:
        raise UserError(f"cannot read the image list ({error.strerror})", given=str(table)) from None
    rows: list[tuple[int, str, int]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{table}, line {number}"
        fields = line.strip().rsplit(maxsplit=1)
        if len(fields) < 2 or not fields[1].lstrip("-").isdecimal():
            given = repr(line.strip()[-60:])
            raise UserError("no label at the end", where=where, given=given, remedy="write 'path label'")
        path, label = fields[0].strip().replace("\\", "/"), int(fields[1])
        if not 0 <= label < num_classes:
            raise UserError("label out of range", where=where, given=label, remedy=f"labels are 0 to {num_classes - 1}")
        if path in seen:
            remedy = f"line {seen[path]} lists it too: keep one"
            raise UserError("image listed twice", where=where, given=path, remedy=remedy)
        seen[path] = number
        rows.append((number, path, label))
    if not rows:
        raise UserError("empty image list", where=table, remedy="list at least one image")
    return rows


def resolve_base(paths: Sequence[str], bases: Iterable[Path], table: Path) -> Path:
    """Return the folder that the paths of a list start from: the first that holds one of the first few.

    Raises
    ------
    UserError
        None does; names the first path and the places.
    """
    places = list(bases)
    for base in places:
        if any((base / path).is_file() for path in paths[:20]):
            return base
    raise UserError(
        "images of the list not found",
        where=table,
        given=paths[0],
        remedy=f"they were looked for under {' and '.join(str(place) for place in places[:3])}",
    )

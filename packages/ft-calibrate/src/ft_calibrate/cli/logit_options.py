"""Options that the verbs on score files share, and what their words mean."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from vfm_core.cli import progress
from vfm_core.errors import UserError

if TYPE_CHECKING:
    from ft_calibrate.groups import ClassGroups
    from ft_calibrate.record import Calibration
    from ft_calibrate.table_checks import IdCollector
    from ft_calibrate.table_formats import TableOptions
    from ft_calibrate.tables import TableFile

log = logging.getLogger(__name__)

NPZ = (
    "An .npz has the arrays logits (N, K), labels (N), classes (K names), ids (N), features (N, D), all but logits "
    "optional; tables have the columns logit_<class>, label and id."
)
TABLE_SUFFIXES = (".csv", ".tsv", ".npz", ".npy", ".parquet", ".feather", ".safetensors")
FILE_SUFFIXES = (*TABLE_SUFFIXES, ".json", ".txt", ".html", ".md", ".png", ".jpg", ".jpeg", ".svg", ".pdf", ".webp")
GROUPS, FILE, CHOICE, RUN = "The classes", "The files", "The choice of gamma", "Run"  # sections of the help

SeenOpt = Annotated[
    str | None,
    typer.Option(
        "--seen",
        metavar="CLASSES",
        help="Seen classes: a,b,c (names or column numbers), a text file with one a line, a splits.json, or an "
        "official split such as office-home:Ar.",
        rich_help_panel=GROUPS,
    ),
]
SeenFromLabelsOpt = Annotated[
    bool,
    typer.Option(
        "--seen-from-labels",
        help="The classes that occur among the labels of the fine-tuning file are seen, its other columns absent.",
        rich_help_panel=GROUPS,
    ),
]
AbsentOpt = Annotated[
    str | None,
    typer.Option(
        "--absent",
        metavar="CLASSES",
        help="Absent classes, written as --seen; default: all that are not seen. Others are remaining classes.",
        rich_help_panel=GROUPS,
    ),
]
RemainingOpt = Annotated[
    str,
    typer.Option(
        "--remaining",
        help="Remaining classes: absent (get gamma too), keep (compete without it) or exclude (masked out).",
        rich_help_panel=GROUPS,
    ),
]
InputOpt = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="KIND",
        help="The scores are logit, logprob or prob (their log is taken, floor 1e-30); default: as the file says, else "
        "logit.",
        rich_help_panel=FILE,
    ),
]
NanOpt = Annotated[
    str,
    typer.Option("--nan", help="Rows with NaN or inf: error, or drop (and count).", rich_help_panel=FILE),
]
PrefixOpt = Annotated[
    str,
    typer.Option("--logit-prefix", help="Score columns are PREFIX<class>.", rich_help_panel=FILE),
]
ColsOpt = Annotated[
    str | None,
    typer.Option("--logit-cols", metavar="A,B,C", help="Score columns by name, in class order.", rich_help_panel=FILE),
]
LabelColOpt = Annotated[
    str | None,
    typer.Option("--label-col", metavar="NAME", help="Column of the labels; default label.", rich_help_panel=FILE),
]
IdColOpt = Annotated[
    str | None, typer.Option("--id-col", metavar="NAME", help="Column of the ids; default id.", rich_help_panel=FILE)
]
SplitOpt = Annotated[
    str | None,
    typer.Option("--split", metavar="NAME", help="Split of a saved HF dataset.", rich_help_panel=FILE),
]
ChunkOpt = Annotated[
    int | None,
    typer.Option(
        "--chunk-rows", min=1, help="Rows in memory at once; default about 16 MB of scores.", rich_help_panel=RUN
    ),
]


def items(text: str, option: str) -> list[str]:
    """The names of a comma-separated option; a name with a comma stands in double quotes."""
    found = [part.strip() for part in next(csv.reader([text], skipinitialspace=True), [])]
    if not found or any(not part for part in found):
        raise UserError("an empty name", where=option, given=repr(text), remedy="separate names by single commas")
    return found


def table_options(
    prefix: str, cols: str | None, label_col: str | None, id_col: str | None, split: str | None
) -> TableOptions:
    """How the columns of the files are called."""
    from ft_calibrate.table_formats import TableOptions

    explicit = None if cols is None else tuple(items(cols, "--logit-cols"))
    return TableOptions(prefix, explicit, label_col, id_col, split=split)


def class_list(text: str, classes: Sequence[str], option: str) -> list[str]:
    """Names (or column numbers) that ``--seen`` or ``--absent`` stands for.

    A single class name is itself; then come files and official splits, then a comma-separated list. A file that is a
    JSON object, and an official split, say both groups; any other file lists the group that the option names.
    """
    from ft_calibrate.split_record import read_split
    from ft_calibrate.splits import is_official, official_split

    if text in classes:
        return [text]
    path = Path(text)
    group = option.removeprefix("--")
    if path.suffix.lower() in (".json", ".txt") or path.is_file():
        if not path.exists():
            raise UserError("no such file of classes", where=option, given=text, remedy="check the path")
        found = read_split(path, classes)
        return list(found.absent if group == "absent" and _is_object(path) else found.seen)
    if is_official(text):
        split = official_split(text).for_classes(classes, option)
        return list(getattr(split, group))
    names = items(text, option)
    parts = {part.strip() for name in classes if "," in name for part in name.split(",")}
    pieces = [name for name in names if name in parts and name not in classes]
    if pieces:
        raise UserError(
            "pieces of class names that have commas",
            where=option,
            given=", ".join(f'"{name}"' for name in pieces),
            remedy="put a name with a comma in double quotes, or the names in a file, one per line",
        )
    return names


def _is_object(path: Path) -> bool:
    """Whether a file of classes is a JSON object (seen, absent) and not a mere list."""
    return path.suffix.lower() == ".json" and path.read_text(encoding="utf-8-sig").lstrip().startswith("{")


def groups_for(
    table: TableFile, seen: str | None, from_labels: bool, absent: str | None, labels_of: TableFile | None = None
) -> ClassGroups:
    """Class groups of a file's columns from the options ``--seen``, ``--seen-from-labels`` and ``--absent``.

    Parameters
    ----------
    labels_of
        The file whose labels ``--seen-from-labels`` means; default ``table``.
    """
    from ft_calibrate.groups import class_groups
    from ft_calibrate.splits import is_official
    from ft_calibrate.streaming import groups_of_file

    if (seen is None) != from_labels:
        given = "neither" if seen is None else "both"
        raise UserError(
            "which classes are seen?",
            where="--seen, --seen-from-labels",
            given=given,
            remedy="give --seen CLASSES, or --seen-from-labels with the fine-tuning file",
        )
    classes = table.classes
    missing = None if absent is None else class_list(absent, classes, "--absent")
    if seen is None:
        groups = groups_of_file(labels_of or table)
        return groups if missing is None else class_groups(classes, groups.seen, missing, where="--absent")
    names = class_list(seen, classes, "--seen")
    if missing is not None:
        class_groups(classes, names, [], where="--seen")  # so that the call below can only blame --absent
        return class_groups(classes, names, missing, where="--absent")
    if is_official(seen) or (Path(seen).is_file() and _is_object(Path(seen))):
        missing = class_list(seen, classes, "--absent")
    return class_groups(classes, names, missing, where="--seen")


def sentence(record: Calibration) -> str:
    """What a record does, with everything a reader must know of it, in one line."""
    parts = [record.effect()]
    if record.ci95 is not None:
        parts.append("95 % interval {:.4g} to {:.4g}".format(*record.ci95))
    parts.append(
        f"method {record.method} ({record.origin()})" + (f", criterion {record.criterion}" if record.criterion else "")
    )
    parts.append(f"chosen on {record.chosen_on or 'unknown data'}")
    parts.append(f"labels of absent classes {'used' if record.uses_absent_labels else 'not used'}")
    if record.uses_test_labels:
        parts.append("uses test labels")
    if record.oracle:
        parts.append("upper bound, not deployable")
    return "; ".join(parts)


def opened(path: Path, quiet: bool, **how: Any) -> TableFile:
    """Open a score file whose readings show a progress bar; arguments as for `open_table`."""
    from ft_calibrate.tables import open_table

    table = open_table(path, **how)
    table.refuse_probabilities = how.get("input") is None
    table.progress = lambda pieces, total: progress(pieces, path.name, total, quiet)
    return table


def ids_of(table: TableFile, rows: int | None) -> IdCollector:
    """The ids of a file."""
    from ft_calibrate.table_checks import IdCollector

    ids = IdCollector()
    for piece in table.chunks(rows):
        ids.add(piece.ids)
    return ids


def check_out(out: Path, inputs: Iterable[Path | str | None], *names: str) -> None:
    """Refuse an output that would overwrite an input, or lie among the shards of one, before anything is read.

    Parameters
    ----------
    out
        What ``--out`` says.
    inputs
        All files and folders that the command reads; a text that is no file is passed over.
    names
        Files that the command writes into the folder ``out``.
    """
    written = [(out / name).resolve() for name in names] or [out.resolve()]
    for given in inputs:
        path = None if given is None else Path(given)
        if path is None or not path.exists() or (isinstance(given, str) and not path.is_file()):
            continue  # a text may be a list of names, such as one for which there is a folder of pictures
        source = path.resolve()
        if source in written or source == out.resolve():
            raise UserError("the output would overwrite an input", where="--out", given=out, remedy="name another file")
        if any(file.parent == source and file.suffix.lower() in TABLE_SUFFIXES for file in written):
            remedy = "write it elsewhere"
            raise UserError("the output would lie among the files of an input", where="--out", given=out, remedy=remedy)
    if not names and out.is_dir():
        raise UserError("this is a folder, not a file to write", where="--out", given=out, remedy="name a file")
    if names and out.is_file():
        raise UserError("this is a file, not a folder to write to", where="--out", given=out, remedy="name a folder")
    if names and not out.is_dir() and out.suffix.lower() in FILE_SUFFIXES:
        remedy = f"name a folder: {', '.join(names)} are written into it"
        raise UserError("a folder with the name of a file", where="--out", given=out, remedy=remedy)


def shared_ids(first: TableFile, first_ids: IdCollector, second: TableFile, second_ids: IdCollector) -> int | None:
    """How many samples are in both files, with a warning; None, and a note, where no ids can tell.

    Files without ids are still compared as wholes, by SHA-256.
    """
    from ft_calibrate.table_checks import warn_duplicates
    from ft_calibrate.tables import file_sha256

    names = (first.path.name, second.path.name)
    if first_ids and second_ids:
        return warn_duplicates(first_ids, second_ids, names)
    same = first.path.resolve() == second.path.resolve()
    if not same and first.path.is_file() and second.path.is_file():
        same = first.path.stat().st_size == second.path.stat().st_size
        same = same and file_sha256(first.path) == file_sha256(second.path)
    if same:
        log.warning("%s and %s are the same file: the result is measured on data that chose it (leak)", *names)
        return first.rows or second.rows
    bare = names[1] if first_ids else names[0]
    typer.echo(f"note: no ids in {bare}: overlap of {names[0]} and {names[1]} not checked", err=True)
    return None

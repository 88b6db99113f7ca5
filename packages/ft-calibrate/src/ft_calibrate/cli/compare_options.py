"""Options that compare, pcv and reproduce share, and what their words mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from vfm_core.cli import progress
from vfm_core.errors import UserError

if TYPE_CHECKING:
    from ft_calibrate.groups import ClassGroups

_MODEL_FAMILIES = ("timm", "torchvision", "open_clip", "hf", "random", "tiny", "tinyworld")  # names, not paths
COURSE, PCV, RUN = "The course of training", "Pseudo cross-validation", "Run"  # sections of the help

FoldsOpt = Annotated[int, typer.Option("--folds", min=1, help="Pseudo splits.", rich_help_panel=PCV)]
CriterionOpt = Annotated[
    str,
    typer.Option("--criterion", help="balanced, overall, harmonic or source-floor.", rich_help_panel=PCV),
]
ValShareOpt = Annotated[
    float,
    typer.Option("--val-share", help="Share of the pseudo-seen samples that is held out.", rich_help_panel=PCV),
]
RemainingOpt = Annotated[
    str, typer.Option("--remaining", help="Classes that are neither seen nor absent: absent, keep or exclude.")
]
ExecutorOpt = Annotated[
    str,
    typer.Option("--executor", help="local, local:N (N processes) or ray: where trainings run.", rich_help_panel=RUN),
]
SeedsOpt = Annotated[str, typer.Option("--seeds", metavar="LIST", help="One training per seed: 0,1,2.")]
SweepOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="AXIS=LIST",
        help="optimizer=sgd,adam, lr=..., weight_decay=..., share=0.25,0.5 (of the seen classes), n_seen=..., "
        "split=random,similarity; several give their product.",
    ),
]
StrictOpt = Annotated[
    bool,
    typer.Option("--strict", help="Stop at the first unreadable image; by default: skipped.csv.", rich_help_panel=RUN),
]
MarkdownOpt = Annotated[bool, typer.Option("--markdown", help="Also write the report as Markdown.")]


def words(text: str, option: str) -> list[str]:
    """``"a, b"`` to ["a", "b"]; commas inside a recipe's options stay: ``distill:T=2,lambda=1`` is one word.

    Raises
    ------
    UserError
        Nothing in the list.
    """
    found: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        if not part:
            continue
        if found and "=" in part and ":" in found[-1] and ":" not in part:  # a further option of the last recipe
            found[-1] += f",{part}"
        else:
            found.append(part)
    if not found:
        raise UserError("empty list", where=option, remedy="name at least one")
    return found


def seed_list(text: str) -> list[int]:
    """``"0,1,2"`` to numbers.

    Raises
    ------
    UserError
        Something that is no whole number of at least 0, or one twice.
    """
    parts = words(text, "--seeds")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise UserError("not a list of seeds", where="--seeds", given=repr(text), remedy="write 0,1,2")
    return [int(part) for part in parts]


def groups_of(names: list[str], seen: str | None, seen_split: str | None, present: Any) -> ClassGroups:
    """S and U as the options say; without them S is what the data have.

    Raises
    ------
    UserError
        Both options, or names that are no class.
    """
    from ft_calibrate.cli.logit_options import class_list
    from ft_calibrate.groups import class_groups

    if seen is not None and seen_split is not None:
        raise UserError("which classes are seen?", given="--seen and --seen-split", remedy="give one of them")
    if seen_split is not None:
        s, u = (class_list(seen_split, names, f"--{group}") for group in ("seen", "absent"))
        return class_groups(names, s, u or None, where="--seen-split")
    if seen is not None:
        return class_groups(names, class_list(seen, names, "--seen"), where="--seen")
    return class_groups(names, present, where="--data")


def bar(description: str, quiet: bool) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """A progress wrapper ``(iterable, total) -> iterable`` for library functions."""
    return lambda iterable, total: progress(iterable, description, total, quiet)


def from_anywhere(spec: str) -> str:
    """A spec of data or of a model with its path made absolute, so that another folder can use it."""
    from vfm_core.specs import parse_spec

    if Path(spec).exists():
        return str(Path(spec).absolute())
    family, colon, rest = spec.partition(":")
    path = parse_spec(spec).name.removeprefix("local-dir:") if colon else ""
    # timm:resnet50 must not be taken for a folder that happens to have the name.
    if not path or not Path(path).exists() or ("/" not in path and family in _MODEL_FAMILIES):
        return spec
    before = "local-dir:" if rest.startswith("local-dir:") else ""
    return f"{family}:{before}{Path(path).absolute()}{rest[len(before) + len(path) :]}"


def folds_changed(path: Path, now: int) -> str:
    """In words, how the number of folds differs from that of an earlier call, kept in ``path``; empty: it does not."""
    try:
        before = int(json.loads(path.read_text(encoding="utf-8"))["folds"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    change = abs(now - before)
    if now > before:
        return f"{change} fold{'s' if change > 1 else ''} added to the {before} of an earlier call"
    return f"{change} of the {before} folds of an earlier call left out" if change else ""


def tell_skipped(skipped: Mapping[str, str], out: Path) -> None:
    """Say on stderr how many images were left out."""
    if skipped:
        typer.echo(f"{len(skipped)} unreadable images skipped: {out / 'skipped.csv'}", err=True)


def finish(failures: Sequence[Mapping[str, Any]], where: Any) -> None:
    """End a run in which trainings failed with one line and exit status 2; the results stay."""
    number = sum(failure["kind"] == "training" for failure in failures)
    if number:
        what = f"{number} training{'s' if number > 1 else ''} failed"
        raise UserError(what, where=where, remedy="the table holds the others; run again to try them again")

"""Options that several verbs share, and the parsing of lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from vfm_core.cli import progress
from vfm_core.errors import UserError

ModelOpt = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="Classifier: tiny:NAME, timm:NAME, torchvision:NAME, open_clip:NAME\\[@TAG], hf:ORG/NAME, dir:PATH, "
        "a head folder of fit-head, or a head's .pth file with --backbone.",
    ),
]
ClassesOpt = Annotated[
    Path | None, typer.Option("--classes", metavar="FILE", help="Class names, one per line, or a JSON list or dict.")
]
HeadBackboneOpt = Annotated[
    str | None, typer.Option("--backbone", metavar="SPEC", help="Backbone under a head's .pth file.")
]
RandomOpt = Annotated[
    bool, typer.Option("--random-weights", help="Untrained weights, to try a command without a download.")
]
OfflineOpt = Annotated[bool, typer.Option("--offline", help="Never use the network; weights come from the cache.")]
SplitOpt = Annotated[str | None, typer.Option("--split", help="Split of the data, such as val.")]
LimitOpt = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many images.")]
ThreadsOpt = Annotated[
    int, typer.Option("--workers", min=0, help="Threads that decode, and as many more that draw and encode.")
]
LayerOpt = Annotated[
    str | None, typer.Option("--layer", metavar="NAME", help="Layer to read; `finecam layers MODEL` lists them.")
]
MethodOpt = Annotated[str, typer.Option("--method", help="CAM family: gradcam, layercam, scorecam, hirescam, ...")]
GammaOpt = Annotated[
    str, typer.Option("--gammas", "--gamma", metavar="LIST", help="Strengths of the contrast, one map each: 0,0.6,1")
]


def numbers(text: str, where: str) -> tuple[float, ...]:
    """``"0,0.6,1"`` to (0.0, 0.6, 1.0).

    Raises
    ------
    UserError
        Something that is no number; nothing at all.
    """
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as e:
        raise UserError("not a list of numbers", where=where, given=repr(text), remedy="write 0,0.6,1") from e
    if not found:
        raise UserError("empty list", where=where, remedy="write 0,0.6,1")
    return found


def names(text: str) -> tuple[str, ...]:
    """``"gradcam, layercam"`` to ("gradcam", "layercam")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def asked(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, rather than at its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def bar(description: str, quiet: bool) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """A progress wrapper ``(iterable, total) -> iterable`` for library functions."""
    return lambda iterable, total: progress(iterable, description, total, quiet)


def loading(
    classes: Path | None = None, backbone: str | None = None, random_weights: bool = False, offline: bool = False
) -> dict[str, Any]:
    """Arguments of `load_classifier` from the shared options."""
    given: dict[str, Any] = {"backbone": backbone, "random_weights": random_weights}
    if classes is not None:
        given["classes"] = classes
    if offline:
        given["offline"] = True
    return given


def finish(failed: int, errors: Path) -> None:
    """End a run that recorded errors: one line and exit status 2; the results stay."""
    if failed:
        raise UserError(
            f"{failed} image{'s' if failed > 1 else ''} failed",
            where=errors,
            remedy="mend or remove them and run again",
        )

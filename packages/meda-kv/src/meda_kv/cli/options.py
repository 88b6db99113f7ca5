"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from vfm_core.errors import UserError

RUN = "Model and run"
METHOD = "Method"

ModelOpt = Annotated[
    str,
    typer.Option("--model", metavar="PATH|ID|tiny", help="Checkpoint folder, hub id, or tiny\\[?seed=1]."),
]
MethodOpt = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help="Of `meda-kv methods`, with \\[?option=value&...] such as 'meda?merge=none'.",
        rich_help_panel=METHOD,
    ),
]
RatioOpt = Annotated[
    float,
    typer.Option("--ratio", metavar="R", help="Share of the prompt's KV to keep, in (0, 1].", rich_help_panel=METHOD),
]
PresetOpt = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="paper or official-code.", rich_help_panel=METHOD)
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one setting of the method, such as merge=none, text_prior=off or decode_budget=512.",
        rich_help_panel=METHOD,
    ),
]
FloorOpt = Annotated[
    int | None,
    typer.Option(
        "--floor",
        min=1,
        help="Fewest tokens per layer (16); short prompts need less. The same as --set floor=N.",
        rich_help_panel=METHOD,
    ),
]
BudgetsOpt = Annotated[
    Path | None,
    typer.Option("--budgets", metavar="FILE", help="profile.json of `meda-kv profile`.", rich_help_panel=METHOD),
]
AttnOpt = Annotated[
    str | None,
    typer.Option("--attn", metavar="NAME", help="sdpa, eager, flash_attention_2 ...", rich_help_panel=RUN),
]
DtypeOpt = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16 or float16; default: the checkpoint's, float32 on the CPU.",
        rich_help_panel=RUN,
    ),
]
DeviceMapOpt = Annotated[
    str | None,
    typer.Option("--device-map", metavar="auto", help="Spread the layers over all GPUs.", rich_help_panel=RUN),
]
ImagesArg = Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="More images, after --image.")]
ImageOpt = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE...", help="Images in order: --image a.jpg b.jpg, or --image several times."),
]
VideoOpt = Annotated[
    Path | None,
    typer.Option("--video", metavar="PATH", help="Instead of images: a folder of frames, an animation or a video."),
]
FramesOpt = Annotated[int, typer.Option("--frames", min=1, help="Frames taken from a video.")]
PromptOpt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="<image> or {image#1} say where images go; default: first."),
]
SystemOpt = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")]
ChatOpt = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: where there is one.")
]
RootOpt = Annotated[
    Path | None,
    typer.Option("--root", metavar="DIR", help="Folder of a milebench: task, or of the paths in a jsonl: file."),
]
TokensOpt = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer.")]


def settings(pairs: Iterable[str] | None, floor: int | None = None) -> dict[str, Any]:
    """Turn ``KEY=VALUE`` options into keywords (numbers, true and false are read as such), and ``--floor`` with them.

    Raises
    ------
    UserError
        A pair without a value, or a floor given twice.
    """
    words: dict[str, Any] = {"true": True, "false": False}
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError("not a setting", where="--set", given=repr(pair), remedy="write KEY=VALUE")
        value: Any = words.get(text.lower(), text)
        for kind in (float, int):
            with contextlib.suppress(ValueError):
                value = kind(text)
        found[key.strip().replace("-", "_")] = value
    if floor is not None and found.setdefault("floor", floor) != floor:
        raise UserError("two floors", where="--floor", given=floor, remedy="drop --floor, or floor= of --set")
    return found


def gathered(image: list[Path] | None, more: list[Path] | None) -> list[Path]:
    """Images of ``--image a b``: the first is the option's, the shell hands the others over as arguments."""
    if image and more and len(image) > 1:
        given = f"{len(image)} times --image, and {len(more)} more"
        raise UserError("the order of the images is not clear", given=given, remedy="use --image once: --image a b c")
    return [*(image or []), *(more or [])]


@contextlib.contextmanager
def supported() -> Iterator[None]:
    """Report a model that cannot be served as bad input (one line, status 2), and warnings as one line each.

    An error whose remedy is a lower floor names the option.
    """
    from meda_kv.evaluation.arms import floor_option

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
        try:
            yield
        except UserError as error:
            raise floor_option(error) from error
        except TypeError as error:
            if str(error).startswith("unsupported"):
                raise UserError(str(error)) from error
            raise

"""Command-line conventions: one way to fail, one set of option names, one look of tables and progress.

Exit codes: 0 done, 1 internal fault, 2 bad input or usage or a file that cannot be read or written, 130 Ctrl-C. An
error is one line on stderr, ``error: <what> in <where>: <given>; <remedy>``; a traceback comes only with ``--debug``.
Results go to stdout, everything else to stderr. Nothing here imports torch before it must, so that ``--help`` answers
at once.

::

    app = make_app("finecam", "Why species A and not B.", "finecam")

    @app.command(epilog=examples("finecam explain photos/ --model tiny:cnn --out cams/"))
    def explain(images: Path, out: OutOpt, device: DeviceOpt = "auto", debug: DebugOpt = False) -> None: ...

    def main() -> None:
        run_app(app)
"""

from __future__ import annotations

import errno
import json
import logging
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from vfm_core.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

EXIT_INTERNAL = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# Square brackets are escaped because help texts are rich markup.
BackboneOpt = Annotated[
    str,
    typer.Option(
        "--backbone",
        metavar="SPEC",
        help="Model: tiny:NAME, timm:NAME, open_clip:NAME\\[@TAG], hf:ORG/NAME or dir:PATH.",
    ),
]
DataOpt = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="Data: tinyworld:NAME\\[?key=value], folder:PATH, csv:PATH, hf:ORG/NAME@SPLIT or a plain folder.",
    ),
]
OutOpt = Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder; the same command again resumes it.")]
DeviceOpt = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:i.")]
DtypeOpt = Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16.")]
SeedOpt = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random choice.")]
WorkersOpt = Annotated[int, typer.Option("--workers", min=0, help="Processes that read images; 0 = in this one.")]
BatchSizeOpt = Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
DebugOpt = Annotated[bool, typer.Option("--debug", help="Log details; show the traceback of an error.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Start the run folder afresh instead of resuming.")]


def make_app(name: str, help: str, package: str) -> typer.Typer:
    r"""Make the Typer app of a package: bare call shows help, ``--version``, shell completion.

    Parameters
    ----------
    name
        Command name.
    help
        What the command does (rich markup: write ``\[`` for a literal bracket).
    package
        Distribution whose version ``--version`` prints.
    """
    app = typer.Typer(
        name=name,
        help=help,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def print_version(value: bool) -> None:
        if value:
            from importlib.metadata import version

            typer.echo(f"{name} {version(package)}")
            raise typer.Exit

    # A default, not an annotation: annotations here are text and could not see `print_version`.
    version_option = typer.Option(
        False, "--version", callback=print_version, is_eager=True, help="Print the version and exit."
    )

    @app.callback()
    def options(version: bool = version_option) -> None:
        pass

    return app


def examples(*commands: str) -> str:
    """Epilog of a command that lists example calls, one per line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(command.replace("[", "\\[") for command in commands)])


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``app`` as the process's main program and exit with the house's exit codes.

    Parameters
    ----------
    arguments
        Without the program name; default ``sys.argv[1:]``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = app.info.name or Path(sys.argv[0]).name
    debug = "--debug" in arguments
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s")
    if debug:
        for package in ("vfm_core", "tinyworld", name.replace("-", "_")):
            logging.getLogger(package).setLevel(logging.DEBUG)
    try:
        result = typer.main.get_command(app)(args=arguments, prog_name=name, standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except Exception as e:
        code = _report_error(e, name, debug)
    if code == EXIT_INTERRUPTED:
        typer.echo(f"\ninterrupted; resume with: {shlex.join([name, *arguments])}", err=True)
    sys.exit(code)


def _report_error(error: Exception, name: str, debug: bool) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # a bare call; the rich help has been printed by the constructor
        return EXIT_BAD_INPUT
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, UserError):
        message, code = str(error), EXIT_BAD_INPUT
    elif hasattr(error, "format_message") and hasattr(error, "exit_code"):  # Click's usage errors, real or vendored
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else name
        message, code = f"{error.format_message().rstrip('.')}; see {command} --help", int(error.exit_code)
    elif isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
        where = f" in {error.filename}" if error.filename is not None else ""
        remedy = "free space" if error.errno == errno.ENOSPC else "check the path and its permissions"
        message, code = f"{error.strerror}{where}; {remedy}", EXIT_BAD_INPUT
    else:
        remedy = "this is a fault of the program" + ("" if debug else "; --debug shows the traceback")
        message, code = f"{type(error).__name__}: {error}; {remedy}", EXIT_INTERNAL
    typer.echo("error: " + " ".join(message.split()), err=True)
    return code


def resolve_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:i`` into a device that exists.

    Raises
    ------
    UserError
        For another word, or a GPU that is not there.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (device != "cuda" and not index.isdecimal())):
        raise UserError("unknown device", where="--device", given=repr(device), remedy="use auto, cpu, cuda or cuda:i")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            given = f"{device!r}, this machine has {count} usable GPU{'' if count == 1 else 's'}"
            raise UserError("no such GPU", where="--device", given=given, remedy="use --device auto")
    return torch.device(device)


def resolve_dtype(dtype: str) -> torch.dtype:
    """Turn ``float32``, ``bfloat16`` or ``float16`` (or ``fp32``, ``bf16``, ``fp16``) into a torch dtype.

    Raises
    ------
    UserError
        For another word.
    """
    import torch

    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    name = names.get(dtype, dtype)
    if name not in names.values():
        remedy = "use float32, bfloat16 or float16"
        raise UserError("unknown dtype", where="--dtype", given=repr(dtype), remedy=remedy)
    return getattr(torch, name)


def progress(iterable: Iterable[T], description: str, total: int | None = None, quiet: bool = False) -> Iterator[T]:
    """Iterate with a progress bar (count, elapsed, ETA) on stderr; silent when ``quiet`` or not on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield from iterable
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield from bar.track(iterable, total=total, description=description)


def print_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Print rows as a table on stdout; numbers flush right, ``–`` for nothing. In a pipe lines are not wrapped."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    from vfm_core.tables import Table, as_rows

    names, body = as_rows(rows)
    content = Table(names, body, "", frozenset())
    table = RichTable(title=Text(title, style="bold") if title else None, box=SIMPLE_HEAD, title_justify="left")
    for name, numeric in zip(names, content.numeric()):
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in content.cells():
        table.add_row(*(Text(cell["text"]) for cell in row))
    Console(width=None if sys.stdout.isatty() else 10_000, soft_wrap=False).print(table)


def print_json(value: Any) -> None:
    """Print ``value`` as strict JSON on stdout (dataclasses, paths, arrays and tensors too; NaN becomes null)."""
    from vfm_core.files import jsonable

    typer.echo(json.dumps(jsonable(value), indent=2, ensure_ascii=False))

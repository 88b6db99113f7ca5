"""Verbs ``demo`` and ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from vfm_core.cli import (
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    OverwriteOpt,
    QuietOpt,
    SeedOpt,
    examples,
    print_json,
    print_table,
    progress,
)

from ft_calibrate.cli import app

DemoOut = Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder; the same command again resumes it.")]


@app.command(epilog=examples("ft-calibrate demo", "ft-calibrate demo --seeds 5 --photos folder:PATH --out study/"))
def demo(
    out: DemoOut = Path("ft-calibrate-demo"),
    seed: SeedOpt = 0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=5, help="How many seeds, from --seed on.")] = 3,
    photos: Annotated[
        str | None,
        typer.Option("--photos", metavar="SPEC", help="Repeat on photos with the splits train and test."),
    ] = None,
    executor: Annotated[
        str | None, typer.Option("--executor", help="local:N works in N processes; default one per core, at most 4.")
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Break and repair a small network: the embedded study, a minute or two, no download."""
    from ft_calibrate.demo import run_demo

    def bar(units: Any, total: int) -> Any:
        return progress(units, "study", total, quiet or as_json)

    result = run_demo(out, seed=seed, seeds=seeds, photos=photos, executor=executor, overwrite=overwrite, progress=bar)
    if as_json:
        print_json(result.to_dict())
        return
    from ft_calibrate.demo_report import short_rows

    print_table(short_rows(result.rows), "Mean over seeds; accuracy on all (Y), seen (S) and absent (U) classes")
    held = sum(one.holds for one in result.checks if one.claim.expected)
    wanted = sum(one.claim.expected for one in result.checks)
    typer.echo(f"{result.verdict}\n{held} of {wanted} claims hold over {seeds} seeds; {result.seconds:.0f} s")
    typer.echo(f"report: {result.report}")


@app.command(epilog=examples("ft-calibrate bench --out bench/", "ft-calibrate bench curve growth --quick"))
def bench(
    sections: Annotated[
        list[str] | None, typer.Argument(help="What to time: curve, growth, sweep, extract; default: all.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for bench.json and report.html.")] = Path(
        "bench"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: seconds instead of minutes.")] = False,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Paired runs; the median counts.")] = 3,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Time the curve, its growth, a sweep of gammas and the extraction against the published and the usual way."""
    from vfm_core.cli import resolve_device

    from ft_calibrate.bench import SECTIONS, run_bench, tables

    result = run_bench(
        out, sections or SECTIONS, quick, repeats=repeats, device=str(resolve_device(device)), quiet=quiet or as_json
    )
    if as_json:
        print_json(result)
        return
    for heading, rows in tables(result):
        print_table(rows, heading)
    typer.echo(str(out / "bench.json"))

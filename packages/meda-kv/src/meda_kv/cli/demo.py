"""Verb ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from vfm_core.cli import DebugOpt, JsonOpt, OverwriteOpt, QuietOpt, SeedOpt, examples, print_json, print_table, progress

from meda_kv.cli import app


@app.command(epilog=examples("meda-kv demo", "meda-kv demo --seeds 1 --albums 20 --out quick/"))
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Run folder; the same command again resumes it.")
    ] = Path("meda-kv-demo"),
    seed: SeedOpt = 0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=3, help="How many networks, from --seed on.")] = 3,
    albums: Annotated[int, typer.Option("--albums", min=1, help="Albums per network and part.")] = 70,
    executor: Annotated[
        str | None, typer.Option("--executor", help="local:N works in N processes; default one per core, at most 4.")
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Compress small networks that read several pictures, by every method: one to two minutes, no download."""
    from meda_kv.demo import run_demo

    def bar(units: Any, total: int) -> Any:
        return progress(units, "study", total, quiet or as_json)

    result = run_demo(out, seed=seed, seeds=seeds, albums=albums, executor=executor, overwrite=overwrite, progress=bar)
    if as_json:
        print_json(result.to_dict())
        return
    from meda_kv.demo_report import short_rows

    print_table(short_rows(result.rows), "Mean score at ratio 0.2 (equal bytes); full is the whole cache")
    for sentence in result.recommendations:
        typer.echo(f"- {sentence}")
    wanted = [one for one in result.checks if one.claim.expected]
    held = sum(one.holds for one in wanted)
    typer.echo(f"{held} of {len(wanted)} claims hold over {seeds} networks; {result.seconds:.0f} s")
    typer.echo(f"report: {result.report}")

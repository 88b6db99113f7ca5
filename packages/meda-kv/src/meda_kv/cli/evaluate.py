"""``meda-kv eval``: answer a task under every method at every ratio, and join the parts of such a run.

``meda-kv score``: score predictions that are there already.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
)
from vfm_core.errors import UserError

from meda_kv.cli import app
from meda_kv.cli.options import (
    AttnOpt,
    BudgetsOpt,
    DeviceMapOpt,
    DtypeOpt,
    FloorOpt,
    ModelOpt,
    PresetOpt,
    RootOpt,
    SetOpt,
    settings,
)

if TYPE_CHECKING:
    from meda_kv.data import Task
    from meda_kv.evaluation import Recommendation, Results

WHAT, HOW, RUN = "What is asked", "How it is answered", "Run"

DEFAULT_METHODS = "full,meda,look-m,snapkv,pyramidkv,h2o,streaming"


@app.command(
    "eval",
    epilog=examples(
        "meda-kv eval --task tinyworld:needle --protocol asked --ratio 0.5,0.2 --floor 4 --out runs/needle",
        "meda-kv eval --model PATH --task milebench:CLEVR-Change --root DIR --methods full,meda,snapkv --out runs/x",
        "meda-kv eval --model PATH --task jsonl:mine.jsonl --methods 'meda,meda?merge=none' --shard 1/4 --out runs/1",
        "meda-kv eval --merge runs/1 runs/2 runs/3 runs/4 --out runs/all",
        "accelerate launch --num_processes 4 -m meda_kv eval --model PATH --task jsonl:mine.jsonl --out runs/all",
    ),
)
def evaluate(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="With --merge: the run folders to join.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder; the same command again resumes it.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Join the folders of shards (or seeds) into --out; nothing is answered.")
    ] = False,
    model: ModelOpt = "tiny",
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="SPEC",
            help="milebench:NAME|GROUP|all, jsonl:PATH or tinyworld:needle|gist|list\\[?n=&images=]; may be repeated.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SPEC|DIR", help="A task as for --task, or the folder of --root.", rich_help_panel=WHAT
        ),
    ] = None,
    root: RootOpt = None,
    frames: Annotated[
        int, typer.Option("--frames", min=1, help="Frames that are taken of a video.", rich_help_panel=WHAT)
    ] = 8,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many samples per task.", rich_help_panel=WHAT)
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option("--max-context", min=1, help="Cut longer prompts from the left, in tokens.", rich_help_panel=WHAT),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "--method",
            metavar="A,B",
            help="Names of `meda-kv methods`, each with \\[?option=value&...]; full is always among them.",
            rich_help_panel=HOW,
        ),
    ] = DEFAULT_METHODS,
    ratio: Annotated[
        str, typer.Option("--ratio", metavar="R,R", help="Shares of the cache to keep.", rich_help_panel=HOW)
    ] = "0.5,0.2,0.1",
    preset: PresetOpt = "paper",
    override: SetOpt = None,
    floor: FloorOpt = None,
    budgets: BudgetsOpt = None,
    protocol: Annotated[
        str,
        typer.Option(
            "--protocol", help="generate, or to ask the compressed cache: asked, agnostic.", rich_help_panel=HOW
        ),
    ] = "generate",
    probe: Annotated[bool, typer.Option("--probe", help="The same as --protocol asked.", rich_help_panel=HOW)] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Default: from the longest expected answer.", rich_help_panel=HOW),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Loss of score that a recommendation accepts.", rich_help_panel=HOW)
    ] = 0.05,
    shard: Annotated[
        str | None,
        typer.Option("--shard", metavar="I/K", help="Only part I of K (1/4 .. 4/4); see --merge.", rich_help_panel=RUN),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Prompts per forward; 32 for tiny, else 1.", rich_help_panel=RUN),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Batch prompts of unequal length, padded on the left.", rich_help_panel=RUN)
    ] = False,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = None,
    attn: AttnOpt = None,
    device_map: DeviceMapOpt = None,
    seed: SeedOpt = 0,
    overwrite: OverwriteOpt = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Also write the report as Markdown.")] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Compare methods at equal memory on a task; one prompt reading serves all of them. Run again to resume.

    Writes table.csv, table.md, report.html with the measured recommendation, and pred.json and eval.json per arm.
    """
    from meda_kv.evaluation.outputs import write_outputs
    from meda_kv.evaluation.recommend import check_tolerance

    if out is None:
        raise UserError("no run folder", where="--out", remedy="give --out DIR")
    check_tolerance(tolerance)
    if merge:
        if task:
            raise UserError("--merge answers nothing", where="--task", given=task[0], remedy="drop it")
        _merge(folders or [], out, tolerance, overwrite, markdown, as_json)
        return
    if folders:
        given = " ".join(map(str, folders))
        raise UserError("folders without --merge", given=given, remedy="add --merge, or name the task with --task")
    task, root = _what(task, data, root)
    if not task:
        raise UserError("no task", where="--task", remedy="give one, such as --task tinyworld:needle")
    if probe and protocol == "agnostic":
        raise UserError("two protocols", where="--probe", given="--protocol agnostic", remedy="give one of them")

    from meda_kv.data import open_task
    from meda_kv.evaluation import evaluate as run
    from meda_kv.evaluation import grid, load_results, merge_runs
    from meda_kv.evaluation.engine import check_samples
    from meda_kv.evaluation.shards import launched_shard, parse_shard, shard_folder, wait_for_all
    from meda_kv.models import load_model

    if shard is not None:
        parse_shard(shard)
    launched = launched_shard() if shard is None else None
    overrides = settings(override)
    if floor is not None:
        settings(override, floor)  # refuses two floors
    chosen = {name: value for name, value in overrides.items() if name != "floor"}
    floor = overrides.get("floor", floor)
    grid(methods, ratio, preset=preset, profile=budgets, floor=floor, **chosen)  # before the model is loaded
    tasks = [open_task(spec, root, limit) for spec in task]
    check_samples([sample for one in tasks for sample in one.samples], "asked" if probe else protocol)
    where = device if launched is None or device != "auto" else _own_device(launched[2])
    vlm, processor = load_model(model, device=where, dtype=dtype, attn=attn, device_map=device_map)
    if max_context is not None:
        tasks = [_cut(one, vlm, processor, max_context) for one in tasks]
    folder, first = out, True
    if launched is not None:
        i, k, _ = launched
        shard, folder, first = f"{i}/{k}", shard_folder(out, i, k), i == 1
    results = run(
        vlm,
        processor,
        tasks,
        methods,
        ratio,
        out=folder,
        protocol="asked" if probe else protocol,
        preset=preset,
        floor=floor,
        overrides=chosen,
        budgets=budgets,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size or (32 if model.partition("?")[0] == "tiny" else 1),
        pad=pad,
        frames=frames,
        seed=seed,
        shard=shard,
        limit=limit,
        model_name=model,
        settings={"tasks": task, "data": _place(root), "attn": attn, "max_context": max_context},
        overwrite=overwrite,
        quiet=quiet or not first,
    )
    if launched is not None:
        wait_for_all()
        if not first:
            return
        k = launched[1]
        merge_runs([shard_folder(out, i, k) for i in range(1, k + 1)], out, overwrite=overwrite)
        results = load_results(out)
    recommendations = write_outputs(results, out, tolerance=tolerance, markdown_report=markdown)
    _tell(results, recommendations, out, as_json)


@app.command(
    epilog=examples(
        "meda-kv score pred.json --task milebench:CLEVR-Change --root DIR",
        "meda-kv score theirs.json mine.json --task milebench:TQA --root DIR --partial --json",
        "meda-kv score pred.jsonl --task jsonl:mine.jsonl --out scores/",
    )
)
def score(
    predictions: Annotated[
        list[Path], typer.Argument(metavar="PRED.json...", help="pred.json or pred.jsonl, made by any program.")
    ],
    task: Annotated[str, typer.Option("--task", metavar="SPEC", help="milebench:NAME, jsonl:PATH or tinyworld:NAME.")],
    root: Annotated[
        Path | None,
        typer.Option("--root", "--data", metavar="DIR", help="Folder of a milebench: task."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Score what is there when samples have no prediction.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write eval.json and eval_score.json (of one file) there."),
    ] = None,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Score a pred.json made elsewhere; nothing is answered, and no model is loaded.

    An entry needs sample_id and pred_response. MileBench's tasks are scored to the letter of its own scorer, all others
    with that scorer's slips mended; where the two differ, both are shown.
    """
    from meda_kv.data.predictions import score_file, write_evaluation

    if out is not None and len(predictions) > 1:
        remedy = "score one file at a time, or drop --out"
        raise UserError("several files for one folder", where="--out", given=f"{len(predictions)} files", remedy=remedy)
    found = [(path, score_file(path, task, root, partial=partial)) for path in predictions]
    if out is not None:
        write_evaluation(out, found[0][1])
    if as_json:
        print_json(
            [
                {
                    "file": path,
                    "task": one.task,
                    "metric": one.metric,
                    "n": len(one.scores),
                    "empty": one.empty,
                    "score": one.score,
                    "official_score": one.official_score,
                    "mended_score": one.mended_score,
                    **one.to_dict(),
                }
                for path, one in found
            ]
        )
        return
    differ = any(one.mended_score != one.official_score for _, one in found)
    rows = []
    for path, one in found:
        facts = one.to_dict()["image_quantity_level-Result"]
        official = {"MileBench's scorer": one.official_score, "mended": one.mended_score} if differ else {}
        levels = {level: total / count for level, (total, count) in facts.items() if count}
        row = {"file": str(path), "metric": one.metric, "n": len(one.scores), "empty": one.empty, "score": one.score}
        rows.append({**row, **official, **(levels if len(levels) > 1 else {})})
    typer.echo(f"{found[0][1].task}: mean score")
    print_table(rows)


def _what(task: list[str] | None, data: str | None, root: Path | None) -> tuple[list[str], Path | None]:
    """Tasks and folder: ``--data`` is a task where it reads as one, and the folder of ``--root`` otherwise."""
    tasks = list(task or [])
    if data is None:
        return tasks, root
    family, colon, _ = data.partition(":")
    if (colon and family in ("milebench", "jsonl", "tinyworld")) or data.endswith(".jsonl"):
        return [*tasks, data], root
    if root is not None:
        raise UserError("two folders", where="--data", given=data, remedy="drop it, --root names the folder")
    return tasks, Path(data)


def _place(root: Path | None) -> str | None:
    return None if root is None else str(root.expanduser().resolve())


def _merge(folders: list[Path], out: Path, tolerance: float, overwrite: bool, markdown: bool, as_json: bool) -> None:
    from meda_kv.evaluation import load_results, merge_runs
    from meda_kv.evaluation.outputs import write_outputs

    _, missing = merge_runs(folders, out, overwrite=overwrite)
    if missing:
        typer.echo(f"warning: shards not there yet: {', '.join(missing)}", err=True)
    results = load_results(out)
    recommendations = write_outputs(results, out, tolerance=tolerance, missing=missing, markdown_report=markdown)
    _tell(results, recommendations, out, as_json)


def _cut(task: Task, model: Any, processor: Any, max_context: int) -> Task:
    from meda_kv.evaluation.protocols import tokens_per_image

    images = next((sample for sample in task.samples if sample.images), None)
    each = tokens_per_image(processor, images) if images is not None else 0
    return task.truncated(getattr(processor, "tokenizer", processor), max_context, each)


def _tell(results: Results, recommendations: list[Recommendation], out: Path, as_json: bool) -> None:
    """Print the tables or JSON, name the failed samples, and exit 1 if there are any."""
    from meda_kv.evaluation.report import failure_rows
    from meda_kv.evaluation.tables import cells_of, count_of, csv_rows, grid_rows, mended_rows, title_of

    rows = results.rows("task") if results.records else []
    failures = failure_rows(results)
    if as_json:
        print_json(
            {
                "out": out,
                "config": results.config,
                "rows": csv_rows(rows, "task"),
                "recommendations": [item.to_dict() for item in recommendations],
                "failed": failures,
            }
        )
    else:
        for name, kind, part in cells_of(rows):
            typer.echo(f"{title_of(name, kind)}: score [95 % interval], {count_of(part)}")
            print_table(grid_rows(part))
        if differ := mended_rows(rows):
            typer.echo("MileBench's scorer, which gave the scores above, and with its slips mended")
            print_table(differ)
        for item in recommendations:
            if item.kind == "all":
                typer.echo(item.sentence())
        typer.echo(str(out / "report.html"))
    if failures:
        count = len({(row["task"], row["sample_id"]) for row in results.errors})
        typer.echo(f"{count} sample{'s' if count > 1 else ''} failed:", err=True)
        for row in failures[:20]:
            typer.echo(f"  {row['task']} {row['sample_id']} ({row['arms']}): {row['error']}", err=True)
        if len(failures) > 20:
            typer.echo(f"  and {len(failures) - 20} more in {out / 'errors.jsonl'}", err=True)
        raise typer.Exit(1)


def _own_device(local_rank: int) -> str:
    """Each launched process takes its own GPU where there are any."""
    import torch

    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"

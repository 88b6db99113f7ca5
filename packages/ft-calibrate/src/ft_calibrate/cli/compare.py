"""Verbs that retrain: pcv, pcv-merge, compare, reproduce."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from vfm_core.cli import (
    DataOpt,
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    OutOpt,
    OverwriteOpt,
    QuietOpt,
    WorkersOpt,
    examples,
    print_json,
    print_table,
    resolve_device,
)
from vfm_core.errors import UserError

from ft_calibrate.cli import app
from ft_calibrate.cli.compare_options import (
    COURSE,
    PCV,
    RUN,
    CriterionOpt,
    ExecutorOpt,
    FoldsOpt,
    MarkdownOpt,
    RemainingOpt,
    SeedsOpt,
    StrictOpt,
    SweepOpt,
    ValShareOpt,
    bar,
    finish,
    folds_changed,
    from_anywhere,
    groups_of,
    seed_list,
    tell_skipped,
    words,
)
from ft_calibrate.cli.models import ClassesOpt, HeadOpt, ModelOpt, OfflineOpt, SourceOpt, TemplateOpt

CALL = "pcv.json"  # what `pcv` was asked for, so that `pcv-merge` needs the folder alone


# ------------------------------------------------------------------------------------------------------------------ pcv
@app.command(
    epilog=examples(
        "ft-calibrate pcv --model runs/ft --source-model runs/pre --data target/ --folds 3 --out runs/pcv",
        "ft-calibrate pcv --model runs/ft --data target/ --fold 0 --out runs/pcv   # one job per fold ...",
        "ft-calibrate pcv-merge runs/pcv                                           # ... then put them together",
    )
)
def pcv(
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="Run folder of the real fine-tuning.")],
    data: DataOpt,
    out: OutOpt,
    source_model: Annotated[
        str | None,
        typer.Option("--source-model", metavar="SPEC", help="Model before fine-tuning; default: as the run says."),
    ] = None,
    folds: FoldsOpt = 3,
    fold: Annotated[
        int | None,
        typer.Option("--fold", min=0, metavar="R", help="Only this fold: separate jobs.", rich_help_panel=PCV),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Train nothing: put finished folds together.", rich_help_panel=PCV)
    ] = False,
    criterion: CriterionOpt = "balanced",
    columns: Annotated[
        str,
        typer.Option("--columns", help="pseudo: sweep over seen logits; all: U too.", rich_help_panel=PCV),
    ] = "pseudo",
    reduce: Annotated[str, typer.Option("--reduce", help="Over folds: mean or median.", rich_help_panel=PCV)] = "mean",
    val_share: ValShareOpt = 0.2,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of splits and trainings; default: the real run's.")
    ] = None,
    remaining: RemainingOpt = "absent",
    executor: ExecutorOpt = "local",
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    strict: StrictOpt = False,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Choose gamma by retraining pseudo models on halves of the seen classes: no label of an absent class is needed."""
    if fold is not None and merge:
        raise UserError("one fold or all?", given="--fold and --merge", remedy="give one of them")
    call: dict[str, Any] = {
        "model": str(Path(model).absolute()) if Path(model).exists() else model,
        "data": from_anywhere(data),
        "source_model": None if source_model is None else from_anywhere(source_model),
        "folds": folds,
        "criterion": criterion,
        "columns": columns,
        "reduce": reduce,
        "val_share": val_share,
        "seed": seed,
        "remaining": remaining,
        "strict": strict,
    }
    _pcv(call, out, fold, merge, executor, workers, device, overwrite, as_json, quiet)


@app.command("pcv-merge", epilog=examples("ft-calibrate pcv-merge runs/pcv"))
def pcv_merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of the pcv jobs.")],
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Put the folds of separate pcv jobs together."""
    try:
        call = json.loads((folder / CALL).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "give the --out folder of ft-calibrate pcv --fold"
        raise UserError("no pseudo cross-validation here", where=folder, given=f"no {CALL}", remedy=remedy) from error
    _pcv(call, folder, None, True, "local", workers, device, False, as_json, quiet)


def _pcv(
    call: dict[str, Any],
    out: Path,
    fold: int | None,
    merge: bool,
    executor: str,
    workers: int,
    device: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from vfm_core.data import open_dataset
    from vfm_core.files import write_json

    from ft_calibrate.pcv_job import pcv_of_run

    place = resolve_device(device)
    options = {name: value for name, value in call.items() if name not in ("model", "data")}
    rows = open_dataset(call["data"])
    run: dict[str, Any] = {"fold": fold, "merge": merge, "executor": executor, "overwrite": overwrite}
    if not merge:
        change = "" if overwrite else folds_changed(out / CALL, call["folds"])
        write_json(out / CALL, call)
        if change:
            typer.echo(f"{out}: {change}", err=True)
    found = pcv_of_run(call["model"], rows, out=out, device=place, workers=workers, **run, **options)
    if found.left_out and not quiet:
        typer.echo(f"{found.left_out} of {len(rows)} images are of other classes: left out", err=True)
    tell_skipped(found.skipped, out)
    estimates = [e for e in (found.result.pcv, found.result.ratio) if e is not None]
    if as_json:
        print_json({"estimates": [e.to_dict() for e in estimates], "files": found.calibrations})
        return
    shown = [
        {"method": e.method, "gamma": e.gamma, "spread": e.std, "per fold": ", ".join(f"{g:.3g}" for g in e.gammas)}
        for e in estimates
    ]
    print_table(shown, "Gamma, from seen classes alone")
    if fold is not None:
        typer.echo(f"fold {fold} of {call['folds']} is done; when all are: ft-calibrate pcv-merge {out}")
        return
    for method, path in found.calibrations.items():
        typer.echo(f"{method}: {path}")
    typer.echo(str(found.report))


# -------------------------------------------------------------------------------------------------------------- compare
@app.command(
    epilog=examples(
        "ft-calibrate compare --model tiny:glyph-cnn --data 'tinyworld:glyphs?domain=target&split=train' "
        "--test 'tinyworld:glyphs?domain=target&split=test' --seen g00,g01,g02,g03,g04 --lr 0.05 --recipes "
        "ft,lp,lp-ft,frozen-head,wise:0.5,distill,rank,lolsgd,source-ensemble --calibrations none,alg,pcv,oracle "
        "--out runs/compare",
        "ft-calibrate compare --model runs/pre --data train/ --test test/ --seen seen.txt --recipes 'ft,wise:*' "
        "--seeds 0,1,2 --executor local:4 --out runs/wise",
        "ft-calibrate compare --model runs/pre --data train/ --test test/ --seen seen.txt --recipes ft "
        "--sweep optimizer=sgd,adam,rmsproptf --sweep lr=0.0001,0.001,0.01 --out runs/optimizers",
    )
)
def compare(
    model: ModelOpt,
    data: DataOpt,
    test: Annotated[str, typer.Option("--test", metavar="SPEC", help="Labelled test data of all classes.")],
    out: OutOpt,
    seen: Annotated[
        str | None,
        typer.Option("--seen", metavar="CLASSES", help="Seen classes: a,b,c, a file or a splits.json."),
    ] = None,
    seen_split: Annotated[
        str | None,
        typer.Option("--seen-split", metavar="SPLIT", help="A splits.json or a reference split, such as ar-30."),
    ] = None,
    recipes: Annotated[
        str, typer.Option("--recipes", metavar="LIST", help="As for train; wise:* is the sweep 0, 0.1 .. 1.")
    ] = "ft,lp,lp-ft,frozen-head,wise:0.5,distill,rank,lolsgd,source-ensemble",
    calibrations: Annotated[
        str,
        typer.Option(
            "--calibrations",
            metavar="LIST",
            help="none, alg, pcv, ratio-pcv, oracle, fixed:G, rate:P, prior, weight-align, val, bic, "
            "temperature-per-group.",
        ),
    ] = "none,alg,pcv,ratio-pcv,oracle",
    seeds: SeedsOpt = "0",
    sweep: SweepOpt = None,
    remaining: RemainingOpt = "absent",
    folds: FoldsOpt = 3,
    criterion: CriterionOpt = "balanced",
    val_share: ValShareOpt = 0.2,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes.", rich_help_panel=COURSE)] = 20,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps per epoch; default: one pass.", rich_help_panel=COURSE)
    ] = None,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate of the head.", rich_help_panel=COURSE)] = 1e-3,
    backbone_lr: Annotated[
        float, typer.Option("--backbone-lr", help="That of the backbone, as a share of it.", rich_help_panel=COURSE)
    ] = 0.1,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd, adam, ...", rich_help_panel=COURSE)] = "sgd",
    momentum: Annotated[float, typer.Option("--momentum", help="Of sgd.", rich_help_panel=COURSE)] = 0.9,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="L2 penalty.", rich_help_panel=COURSE)] = 5e-4,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images per step.", rich_help_panel=COURSE)
    ] = 64,
    precision: Annotated[str, typer.Option("--mixed-precision", help="no, bf16 or fp16.", rich_help_panel=RUN)] = "no",
    source_ckpt: SourceOpt = None,
    head: HeadOpt = None,
    classes: ClassesOpt = None,
    template: TemplateOpt = None,
    offline: OfflineOpt = False,
    executor: ExecutorOpt = "local",
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    strict: StrictOpt = False,
    overwrite: OverwriteOpt = False,
    markdown: MarkdownOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Train every recipe, calibrate each in every way, and print one table; run again to resume or to add to it.

    Recipes, calibrations, seeds and values of a sweep may be added; other settings need another --out.
    """
    from vfm_core.data import open_dataset

    from ft_calibrate.classifier import load_classifier
    from ft_calibrate.compare_rows import display
    from ft_calibrate.compare_sweep import parse_sweep
    from ft_calibrate.comparison import run_comparison
    from ft_calibrate.target_data import named, target_data

    place = resolve_device(device)
    wanted, chosen, numbers = words(recipes, "--recipes"), words(calibrations, "--calibrations"), seed_list(seeds)
    axes = parse_sweep(sweep or [])
    loading: dict[str, Any] = {"source_ckpt": source_ckpt, "head": head, "classes": classes, "template": template}
    train, held_out = open_dataset(data), open_dataset(test)
    source = named(load_classifier(model, device=place, offline=offline or None, **loading), train)
    names = source.class_names or []
    groups = groups_of(names, seen, seen_split, target_data(train, names, "--data").present())
    found = run_comparison(
        source,
        train,
        held_out,
        groups.seen,
        wanted,
        chosen,
        absent=groups.absent,
        out=out,
        seeds=numbers,
        remaining=remaining,
        sweep=axes,
        folds=folds,
        val_share=val_share,
        criterion=criterion,
        executor=executor,
        overwrite=overwrite,
        markdown=markdown,
        strict=strict,
        progress=bar("trainings", quiet),
        epochs=epochs,
        steps_per_epoch=steps,
        lr=lr,
        backbone_lr_scale=backbone_lr,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_size=batch_size,
        mixed_precision=precision,
        device=place,
        workers=workers,
    )
    if as_json:
        print_json({"rows": found.rows, "failures": found.failures, "report": found.report})
    else:
        print_table(display(found.rows), "Recipes and calibrations")
        typer.echo(str(found.report))
    tell_skipped(found.skipped, out)
    finish(found.failures, out / "errors.jsonl")


# ------------------------------------------------------------------------------------------------------------ reproduce
@app.command(
    epilog=examples(
        "ft-calibrate reproduce office-home --data-root OfficeHome --out runs/office --device cuda --workers 8",
        "ft-calibrate reproduce office-home --data-root OfficeHome --out runs/try --quick --cases Ar-Cl",
        "ft-calibrate reproduce imagenet-r --data-root data --recipes ft,lolsgd+rank --out runs/r",
    )
)
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An experiment; --list shows them.")] = "",
    data_root: Annotated[Path | None, typer.Option("--data-root", metavar="DIR", help="Where the data lie.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder; again resumes.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show the experiments and leave.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Trial: few pictures, one short epoch. No result.")] = False,
    cases: Annotated[str | None, typer.Option("--cases", metavar="LIST", help="Only these target domains.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="SPEC", help="Another source model.")] = None,
    source_ckpt: Annotated[
        str | None,
        typer.Option("--source-ckpt", metavar="FILE", help="Its checkpoint; {source} and {case} are filled in."),
    ] = None,
    recipes: Annotated[str | None, typer.Option("--recipes", metavar="LIST", help="Other recipes.")] = None,
    calibrations: Annotated[
        str | None, typer.Option("--calibrations", metavar="LIST", help="Other calibrations.")
    ] = None,
    seeds: SeedsOpt = "0",
    sweep: SweepOpt = None,
    image_size: Annotated[int | None, typer.Option("--image-size", min=8, help="Side of the pictures.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Other than the paper's.")] = None,
    executor: ExecutorOpt = "local",
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    strict: StrictOpt = False,
    overwrite: OverwriteOpt = False,
    markdown: MarkdownOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Run an experiment of the papers on your copy of its data, and check the papers' claims on your numbers."""
    from ft_calibrate.compare_sweep import parse_sweep
    from ft_calibrate.experiments import EXPERIMENTS, find_experiment

    if list_all:
        print_table([{"name": e.name, "what": e.title, "paper": e.paper} for e in EXPERIMENTS.values()])
        return
    find_experiment(name)
    if data_root is None or out is None:
        missing = "--data-root" if data_root is None else "--out"
        raise UserError("missing option", given=missing, remedy="give the folder of the data and a run folder")
    from ft_calibrate.reproduce_report import VERDICTS, with_reference
    from ft_calibrate.reproduction import reproduce as run

    found = run(
        name,
        data_root,
        out=out,
        quick=quick,
        model=model,
        source_ckpt=source_ckpt,
        recipes=None if recipes is None else words(recipes, "--recipes"),
        calibrations=None if calibrations is None else words(calibrations, "--calibrations"),
        cases=None if cases is None else words(cases, "--cases"),
        sweep=parse_sweep(sweep or []),
        seeds=seed_list(seeds),
        image_size=image_size,
        executor=executor,
        overwrite=overwrite,
        markdown=markdown,
        strict=strict,
        progress=bar("trainings", quiet),
        device=resolve_device(device),
        workers=workers,
        **({} if epochs is None else {"epochs": epochs}),
    )
    if as_json:
        print_json(found.__dict__)
    else:
        print_table(with_reference(found.rows, found.reference), f"{name}: own numbers, mean over target domains")
        print_table([{**check, "holds": VERDICTS[check["holds"]]} for check in found.checks], "Claims of the paper")
        if quick:
            typer.echo("a trial run: these numbers mean nothing")
        typer.echo(str(found.report))
    tell_skipped(found.skipped, out)
    finish(found.failures, out)

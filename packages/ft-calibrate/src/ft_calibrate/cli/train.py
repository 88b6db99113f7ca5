"""The verb train: fine-tune by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from vfm_core.cli import (
    DataOpt,
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    OutOpt,
    OverwriteOpt,
    QuietOpt,
    SeedOpt,
    WorkersOpt,
    examples,
    print_json,
    print_table,
    resolve_device,
)
from vfm_core.errors import UserError, unknown_name

from ft_calibrate.cli import app
from ft_calibrate.cli.models import ClassesOpt, HeadOpt, ModelOpt, OfflineOpt, SourceOpt, TemplateOpt

if TYPE_CHECKING:
    from vfm_core.data import ImageDataset

    from ft_calibrate.classifier import Classifier

CLASSES, RECIPE, COURSE, RUN = "The classes", "The recipe", "The course of training", "Run"  # sections of the help


def _list_recipes(value: bool) -> None:
    if value:
        from ft_calibrate.recipes.spec import recipe_rows

        print_table(recipe_rows(), "Parts of a recipe; join them with +")
        raise typer.Exit


@app.command(
    epilog=examples(
        "ft-calibrate train --model tiny:glyph-cnn --data 'tinyworld:glyphs?domain=target' --seen g00,g01,g02,g03 "
        "--lr 0.05 --test 'tinyworld:glyphs?domain=target&split=test' --out runs/ft",
        "ft-calibrate train --model timm:resnet50 --source-ckpt source.pth --data 'office-home:data?domain=Cl@train' "
        "--seen-split ar-30 --recipe lolsgd+distill --augment office-home --steps 500 --out runs/cl",
        "ft-calibrate train --model runs/pre --data photos/ --seen seen.txt --recipe wise:0.5 --out runs/wise",
        "ft-calibrate train --model timm:resnet50 --data photos/ --recipe lolsgd:M=8 --local 3 --out runs/shared",
        "accelerate launch -m ft_calibrate train --model timm:resnet50 --data photos/ --out runs/many-gpus",
        "ft-calibrate train --list-recipes",
    )
)
def train(
    model: ModelOpt,
    data: DataOpt,
    out: OutOpt,
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="SPEC", help="Labelled test data of all classes, for the accuracies."),
    ] = None,
    seen: Annotated[
        str | None,
        typer.Option(
            "--seen",
            metavar="CLASSES",
            help="Seen classes: a,b,c, a text file with one a line, or a splits.json; default: those of the data.",
            rich_help_panel=CLASSES,
        ),
    ] = None,
    seen_split: Annotated[
        str | None,
        typer.Option(
            "--seen-split",
            metavar="SPLIT",
            help="A splits.json or a reference split, such as ar-30: S and U together.",
            rich_help_panel=CLASSES,
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            help="Parts joined by +, each with its options: ft, wise:0.5, lolsgd:M=4+distill:T=2,lambda=1 ...",
            rich_help_panel=RECIPE,
        ),
    ] = "ft",
    list_recipes: Annotated[
        bool,
        typer.Option(
            "--list-recipes", callback=_list_recipes, is_eager=True, help="Show all parts.", rich_help_panel=RECIPE
        ),
    ] = False,
    all_data: Annotated[
        str | None,
        typer.Option(
            "--all-data",
            metavar="SPEC",
            help="Target data of all classes, for oracle-ft (default: --data) and --log-analyses.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes.", rich_help_panel=COURSE)] = 20,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Steps per epoch and LOLSGD run; default: one pass.", rich_help_panel=COURSE
        ),
    ] = None,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate of the head.", rich_help_panel=COURSE)] = 1e-3,
    backbone_lr: Annotated[
        float, typer.Option("--backbone-lr", help="That of the backbone, as a share of it.", rich_help_panel=COURSE)
    ] = 0.1,
    optimizer: Annotated[
        str,
        typer.Option(
            "--optimizer", help="sgd (Nesterov), adam, adamw, adabelief, adadelta, ...", rich_help_panel=COURSE
        ),
    ] = "sgd",
    momentum: Annotated[float, typer.Option("--momentum", rich_help_panel=COURSE, help="Of sgd.")] = 0.9,
    weight_decay: Annotated[float, typer.Option("--weight-decay", rich_help_panel=COURSE, help="L2 penalty.")] = 5e-4,
    grad_clip: Annotated[
        float | None, typer.Option("--grad-clip", help="Greatest norm of the gradient.", rich_help_panel=COURSE)
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images per step and process.", rich_help_panel=COURSE)
    ] = 64,
    augment: Annotated[
        str,
        typer.Option(
            "--augment",
            help="none, or office-home: random crop, mirroring, colours, greys; test images squashed.",
            rich_help_panel=COURSE,
        ),
    ] = "none",
    log_analyses: Annotated[
        bool,
        typer.Option(
            "--log-analyses",
            help="Keep logit scale, margin, head norms and feature movement on --test per epoch, for report --epochs; "
            "with --all-data of training samples too (diagnosis only).",
            rich_help_panel=COURSE,
        ),
    ] = False,
    every_epoch: Annotated[
        bool,
        typer.Option("--every-epoch/--at-the-end", help="When to measure on --test.", rich_help_panel=COURSE),
    ] = True,
    source_ckpt: SourceOpt = None,
    head: HeadOpt = None,
    classes: ClassesOpt = None,
    template: TemplateOpt = None,
    offline: OfflineOpt = False,
    executor: Annotated[
        str, typer.Option("--executor", help="LOLSGD: local, or local:N for N processes.", rich_help_panel=RUN)
    ] = "local",
    local: Annotated[
        int | None,
        typer.Option(
            "--local",
            min=0,
            metavar="M",
            help="LOLSGD as separate jobs: this one does local run M; all share --out.",
            rich_help_panel=RUN,
        ),
    ] = None,
    precision: Annotated[str, typer.Option("--mixed-precision", help="no, bf16 or fp16.", rich_help_panel=RUN)] = "no",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Stop at the first unreadable image; by default: skipped.csv.", rich_help_panel=RUN
        ),
    ] = False,
    workers: WorkersOpt = 0,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Fine-tune a classifier on data of some of its classes; run again to resume. --list-recipes shows the recipes."""
    from vfm_core.data import open_dataset

    from ft_calibrate.epoch_log import without_series
    from ft_calibrate.recipes.finetune import fine_tune
    from ft_calibrate.recipes.outcome import LoggedAccuracy, TestAccuracy, measure, write_report
    from ft_calibrate.recipes.run import RUN_FILE
    from ft_calibrate.recipes.spec import parse_recipe
    from ft_calibrate.recipes.training import is_main
    from ft_calibrate.skipped_images import SKIPPED, SkippedImages, write_skipped

    parsed = parse_recipe(recipe)
    if log_analyses and (test is None or not every_epoch):
        remedy = "give --test" if test is None else "leave --at-the-end out"
        raise UserError("analyses per epoch need test data after every epoch", where="--log-analyses", remedy=remedy)
    place = resolve_device(device)
    loading: dict[str, Any] = {"source_ckpt": source_ckpt, "head": head, "classes": classes, "template": template}
    source = _classifier(model, {**loading, "offline": offline or None}, place, augment)
    rows = open_dataset(data)
    tested = open_dataset(test) if test is not None else None
    everything = open_dataset(all_data) if all_data is not None else None
    source, groups = _groups(source, rows, seen, seen_split)
    if parsed.scheme != "oracle-ft":
        rows = _rows_of_seen(rows, groups, source, quiet)
    skipped = SkippedImages()
    on_error = None if strict else skipped
    complete = (out / RUN_FILE).is_file() and not overwrite
    check: Any = None
    if log_analyses and is_main(local):  # one process looks
        from ft_calibrate.epoch_log import EpochLog

        how: dict[str, Any] = {"batch_size": max(batch_size, 64), "workers": workers, "on_error": on_error}
        keep = out / "state" / "class_means.npz"
        check = LoggedAccuracy(EpochLog(groups, tested, train=everything, classifier=source, keep=keep, **how))
    elif tested is not None and every_epoch:
        check = TestAccuracy(source, tested, groups, max(batch_size, 64), workers, on_error)
    run = fine_tune(
        source,
        rows,
        groups.seen,
        parsed,
        optimizer=optimizer,
        lr=lr,
        backbone_lr_scale=backbone_lr,
        momentum=momentum,
        weight_decay=weight_decay,
        epochs=epochs,
        batch_size=batch_size,
        steps_per_epoch=steps,
        grad_clip=grad_clip,
        augment=_augmentation(augment, source),
        validate=check,
        callbacks=[] if quiet or not is_main(local) else [_Progress(parsed.text)],
        seed=seed,
        out=out,
        overwrite=overwrite,
        workers=workers,
        device=place,
        mixed_precision=precision,
        all_data=everything,
        absent=groups.absent,
        executor=executor,
        local=local,
        on_error=on_error,
        source=_source(model, loading),
    )
    if not is_main(local):
        return
    outcome = measure(
        run,
        source,
        rows,
        tested,
        absent=groups.absent,
        batch_size=max(batch_size, 64),
        workers=workers,
        on_error=on_error,
    )
    if skipped.items:  # a finished run reads no picture again, and keeps its list
        write_skipped(out / SKIPPED, skipped.items)
    if outcome.calibration is not None:
        outcome.calibration.write(out / "calibration.json")
    else:
        (out / "calibration.json").unlink(missing_ok=True)  # of a run that was overwritten
    report = out / "report.html"
    if not (complete and tested is None and report.is_file()):  # else it may hold more than is known now
        write_report(run, outcome, out)
    if as_json:
        print_json({"out": out, "recipe": run.recipe, "report": report, **outcome.to_dict(), "history": run.history})
        return
    if outcome.rows:
        print_table([_readable(row) for row in outcome.rows], "Accuracy on test data")
    if outcome.calibration is not None:
        typer.echo(f"gamma_ALG = {outcome.calibration.gamma:.4g}, measured on the training data: calibration.json")
    if log_analyses and without_series(run.history[0]) == run.history[0]:
        typer.echo("the run was finished without --log-analyses: add --overwrite to train again", err=True)
    if skipped.items:
        typer.echo(f"{len(skipped.items)} unreadable images skipped: skipped.csv", err=True)
    typer.echo(f"model, history and report in {out}: open {report}")


def _classifier(model: str, loading: dict[str, Any], place: Any, augment: str) -> Classifier:
    """The source model, prepared for pictures as the augmentation wants them."""
    import dataclasses

    from ft_calibrate.classifier import load_classifier

    if augment not in ("none", "office-home"):
        raise unknown_name("augmentation", augment, ["none", "office-home"], where="--augment")
    source = load_classifier(model, device=place, **loading)
    if augment == "office-home" and source.preprocess is not None:
        # As published: a resize to the exact input size, no crop; in training the augmentation has cropped already.
        source.preprocess = dataclasses.replace(source.preprocess, resize="squash", crop_pct=1.0)
    return source


def _augmentation(name: str, source: Classifier) -> Any:
    if name == "none":
        return None
    from ft_calibrate.augment import Augmentation

    if source.preprocess is None:
        raise UserError("the model does not say how large its input is", where="--augment", remedy="use none")
    return Augmentation(size=source.preprocess.size[0])


def _source(model: str, loading: dict[str, Any]) -> dict[str, Any]:
    """What `load_run` needs to load the source again; paths as they will be found from anywhere."""
    found: dict[str, Any] = {"spec": str(Path(model).absolute()) if Path(model).exists() else model}
    for key in ("source_ckpt", "classes"):
        if loading[key] is not None:
            found[key] = str(Path(loading[key]).absolute())
    return found | {key: loading[key] for key in ("head", "template") if loading[key] is not None}


def _groups(source: Classifier, rows: ImageDataset, seen: str | None, seen_split: str | None) -> tuple[Classifier, Any]:
    """The classifier with names for its columns, and the class groups that the options mean."""
    from ft_calibrate.cli.compare_options import groups_of
    from ft_calibrate.target_data import named, target_data

    source = named(source, rows)
    names = list(source.class_names or [])
    return source, groups_of(names, seen, seen_split, target_data(rows, names, "--data").present())


def _rows_of_seen(rows: ImageDataset, groups: Any, source: Classifier, quiet: bool) -> ImageDataset:
    """The training rows of seen classes; data sets usually hold them all."""
    import numpy as np

    from ft_calibrate.target_data import target_data

    columns = target_data(rows, source.class_names or [], "--data").columns
    keep = np.flatnonzero(np.isin(columns, groups.seen))
    if len(keep) == 0:
        raise UserError("no image of a seen class", where="--data", given=rows.name, remedy="check --seen")
    if len(keep) < len(rows) and not quiet:
        typer.echo(f"{len(rows) - len(keep)} of {len(rows)} training images are of other classes: left out", err=True)
    return rows if len(keep) == len(rows) else rows.subset(keep)


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


class _Progress:
    """One line per epoch on stderr."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe

    def __call__(self, model: Any, record: dict[str, Any]) -> None:
        from ft_calibrate.epoch_log import without_series

        numbers = ", ".join(
            f"{k} {v:.3f}"
            for k, v in without_series(record).items()
            if isinstance(v, float) and k not in ("lr", "seconds")
        )
        typer.echo(f"{self.recipe}: {record['stage']} epoch {record['epoch']}: {numbers or 'start'}", err=True)

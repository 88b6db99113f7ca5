"""The verb that diagnoses: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from vfm_core.cli import DebugOpt, JsonOpt, QuietOpt, SeedOpt, examples, print_json, print_table, progress
from vfm_core.errors import UserError, unknown_name

from ft_calibrate.cli import app
from ft_calibrate.cli.logit_options import (
    AbsentOpt,
    ColsOpt,
    IdColOpt,
    InputOpt,
    LabelColOpt,
    NanOpt,
    PrefixOpt,
    RemainingOpt,
    SeenFromLabelsOpt,
    SeenOpt,
    SplitOpt,
    class_list,
    table_options,
)


@app.command(
    epilog=examples(
        "ft-calibrate report test.npz --seen seen.txt --before test_before.npz --features -o report/",
        "ft-calibrate report test.npz --seen-from-labels --train train.npz --before test_before.npz -o report/",
        "ft-calibrate report test.npz --seen seen.txt --before test_before.npz --reference oracle.npz "
        "--reference-before oracle_before.npz --model-before runs/pre --model-after runs/ft -o report/",
    )
)
def report(
    test: Annotated[Path, typer.Argument(metavar="TEST", help="Logits of the fine-tuned model on labelled test data.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the report.")],
    seen: SeenOpt = None,
    seen_from_labels: SeenFromLabelsOpt = False,
    before: Annotated[
        Path | None,
        typer.Option("--before", metavar="FILE", help="The same samples, by the model before fine-tuning."),
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Require features in the files (they are used wherever there).")
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="FILE",
            help="Logits and features of target training data of all classes, for class means; diagnosis only.",
        ),
    ] = None,
    reference_before: Annotated[
        Path | None,
        typer.Option("--reference-before", metavar="FILE", help="The same data, by the model before fine-tuning."),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option("--train", metavar="FILE", help="Logits of the fine-tuning data: gives gamma_ALG."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="A calibration by fit or pcv, shown beside the others."),
    ] = None,
    model_before: Annotated[
        str | None, typer.Option("--model-before", metavar="SPEC", help="Model before fine-tuning, for its head.")
    ] = None,
    model_after: Annotated[
        str | None, typer.Option("--model-after", metavar="SPEC", help="Fine-tuned model, for its head.")
    ] = None,
    head: Annotated[str | None, typer.Option("--head", metavar="NAME", help="Layer that makes the logits.")] = None,
    absent: AbsentOpt = None,
    remaining: RemainingOpt = "absent",
    epochs: Annotated[
        Path | None,
        typer.Option(
            "--epochs",
            metavar="RUN",
            help="Series per epoch: the folder of a run of train --log-analyses, or its results.jsonl.",
        ),
    ] = None,
    input: InputOpt = None,
    nan: NanOpt = "error",
    logit_prefix: PrefixOpt = "logit_",
    logit_cols: ColsOpt = None,
    label_col: LabelColOpt = None,
    id_col: IdColOpt = None,
    split: SplitOpt = None,
    bootstrap: Annotated[int, typer.Option("--bootstrap", min=2, help="Paired resamples of every interval.")] = 1000,
    projection: Annotated[str, typer.Option("--projection", help="Picture of the features: tsne or pca.")] = "tsne",
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Say what fine-tuning broke: logit scale, features, both or nothing. Writes the whole report."""
    if projection not in ("tsne", "pca"):
        raise unknown_name("projection", projection, ("tsne", "pca"), where="--projection")
    if (seen is None) != seen_from_labels:
        given = "neither" if seen is None else "both"
        remedy = "give --seen CLASSES, or --seen-from-labels with --train"
        raise UserError("which classes are seen?", where="--seen, --seen-from-labels", given=given, remedy=remedy)
    if seen_from_labels and train is None:
        raise UserError("no fine-tuning data", where="--seen-from-labels", remedy="give them with --train")

    from vfm_core.runs import writable_folder

    from ft_calibrate.diagnosis import diagnose
    from ft_calibrate.record import read_calibration
    from ft_calibrate.tables import read_table

    writable_folder(out)
    columns = table_options(logit_prefix, logit_cols, label_col, id_col, split)
    options: dict[str, Any] = {"input": input, "nan": nan, "options": columns}
    files = {"before": before, "reference": reference, "reference_before": reference_before, "train": train}
    after = read_table(test, **options)
    tables = {name: None if path is None else read_table(path, **options) for name, path in files.items()}
    if features:
        for path, table in ((test, after), (before, tables["before"])):
            if table is not None and table.features is None:
                remedy = "extract them: ft-calibrate extract --features, or leave out --features"
                raise UserError("no features", where=path, remedy=remedy)
    if seen is not None and absent is None and Path(seen).suffix.lower() == ".json":  # a split may say which are absent
        absent = seen
    diagnosis = diagnose(
        after,
        _seen(tables["train"]) if seen is None else class_list(seen, after.classes, "--seen"),
        tables["before"],
        tables["reference"],
        tables["train"],
        reference_before=tables["reference_before"],
        absent=None if absent is None else class_list(absent, after.classes, "--absent"),
        head_before=_head(model_before, head),
        head_after=_head(model_after, head),
        epochs=None if epochs is None else _records(epochs),
        calibration=None if calibration is None else read_calibration(calibration),
        remaining=remaining,
        n_bootstrap=bootstrap,
        seed=seed,
    )
    page = diagnosis.to_html(
        out, projection=projection, progress=lambda names, total: progress(names, "figures", total, quiet)
    )
    if as_json:
        print_json(diagnosis.to_dict())
        return
    print_table(diagnosis.tables["accuracy"], "Accuracy [95 % interval]; A/B: samples of A, classes of B compete")
    for note in diagnosis.notes:
        typer.echo(f"note: {note}")
    if "ncm" in diagnosis.tables:
        typer.echo("note: class means use labels of absent classes: for diagnosis only.")
    typer.echo("note: gamma* is an upper bound, not deployable.")
    typer.echo(diagnosis.sentence)
    for step in diagnosis.next_steps:
        typer.echo(f"  - {step}")
    typer.echo(str(page))


def _seen(train: Any) -> list[str]:
    """The classes that occur among the labels of the fine-tuning data."""
    import numpy as np

    if train.labels is None:
        raise UserError("no labels", where=train.path, remedy="name the classes with --seen")
    return [train.classes[int(c)] for c in np.unique(train.labels[train.labels >= 0])]


def _head(spec: str | None, name: str | None) -> Any:
    if spec is None:
        return None
    from ft_calibrate.classifier import load_classifier

    return load_classifier(spec, head=name, device="cpu")


def _records(path: Path) -> list[dict[str, Any]]:
    import json

    if path.is_dir():
        path = path / "results.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as e:
        raise UserError("no history here", where=path, given=e.strerror, remedy="give the folder of a run") from e
    except (ValueError, UnicodeDecodeError) as e:
        raise UserError("not JSON lines", where=path, given=e, remedy="give the history of a run") from e
    if not all(isinstance(line, dict) for line in lines):
        raise UserError("not JSON lines of records", where=path, remedy="give the history of a run")
    from ft_calibrate.epoch_log import SERIES, series

    if not any(series(lines, name.removesuffix("/"))[0] for name in SERIES):
        raise UserError("no series per epoch", where=path, remedy="train with --log-analyses")
    return lines

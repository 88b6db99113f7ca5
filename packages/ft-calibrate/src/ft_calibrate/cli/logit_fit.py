"""The verb ``fit``: choose gamma from files of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from vfm_core.cli import DebugOpt, JsonOpt, QuietOpt, SeedOpt, examples, print_json
from vfm_core.errors import UserError

from ft_calibrate.cli import app
from ft_calibrate.cli.logit_options import (
    CHOICE,
    GROUPS,
    NPZ,
    RUN,
    AbsentOpt,
    ChunkOpt,
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
    check_out,
    groups_for,
    ids_of,
    opened,
    sentence,
    shared_ids,
    table_options,
)

if TYPE_CHECKING:
    from ft_calibrate.groups import ClassGroups
    from ft_calibrate.record import Calibration
    from ft_calibrate.tables import TableFile

ON_LABELS = ("oracle", "val", "bic", "temperature-per-group")
ON_FOLDS = ("pcv", "ratio-pcv")
OWNERS = {  # the methods that an option is for
    "--val": (*ON_LABELS, "rate"),
    "--criterion": (*ON_LABELS, *ON_FOLDS),
    "--floor": ("oracle", "val"),
    "--fold-file": ON_FOLDS,
    "--columns": ON_FOLDS,
    "--reduce": ON_FOLDS,
    "--gamma": ("fixed",),
    "--rate": ("rate",),
    "--prior": ("prior",),
    "--smoothing": ("prior",),
    "--head": ("weight-align",),
    "--layer": ("weight-align",),
    "--bic-on": ("bic",),
    "--group-temperature": ("temperature-per-group",),
}
DIRECT = ("gamma", "criterion", "rate", "smoothing", "bic_on", "group_temperature", "columns", "reduce", "floor")
ARGUMENTS = {  # what the Python interface calls the options
    "gamma": "--gamma", "rate": "--rate", "folds": "--fold-file", "head_weight": "--head", "absent": "--absent",
    "group_temperature": "--group-temperature", "temperature": "--temperature", "criterion": "--criterion",
}  # fmt: skip
FEWEST = 100  # resamples that an interval needs
NEAR_ZERO = 0.1  # a fold's average logit gap below this share of the real model's makes its ratio unreliable


@app.command(
    epilog=examples(
        "ft-calibrate fit train_logits.npz --seen-from-labels --method alg -o gamma.json",
        "ft-calibrate fit train.npz --seen-from-labels --method val --val few_labelled.csv -o gamma.json",
        "ft-calibrate fit train.npz --seen-from-labels --method rate --rate 0.4 --val target.parquet -o gamma.json",
        "ft-calibrate fit train.npz --seen-from-labels --method pcv --fold-file 0.npz --fold-file 1.npz -o gamma.json",
        "ft-calibrate fit test.npz --seen seen.txt --method oracle --criterion harmonic -o upper_bound.json",
    )
)
def fit(
    table: Annotated[
        Path, typer.Argument(metavar="FILE", help=f"Scores with labels, as a rule of the fine-tuning data. {NPZ}")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="JSON", help="Calibration file to write.")],
    seen: SeenOpt = None,
    seen_from_labels: SeenFromLabelsOpt = False,
    absent: AbsentOpt = None,
    remaining: RemainingOpt = "absent",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="alg, pcv, oracle (the paper's); fixed, val, rate, ratio-pcv, prior, weight-align, bic, "
            "temperature-per-group (not from the paper).",
            rich_help_panel=CHOICE,
        ),
    ] = "alg",
    gamma: Annotated[
        float | None, typer.Option("--gamma", help="The number, for --method fixed.", rich_help_panel=CHOICE)
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", help="Expected share of absent samples, for --method rate.", rich_help_panel=CHOICE),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(
            "--val",
            metavar="FILE",
            help="The data that choose, where they are not FILE: labelled samples of all classes for val, oracle, bic "
            "and temperature-per-group, unlabelled target data for rate.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    fold_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--fold-file",
            metavar="NPZ",
            help="Scores of one pseudo model, for pcv and ratio-pcv; repeat it. Keys: logits, labels, pseudo_seen, "
            "train_logits, train_labels, floor or source_logits.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            help="What gamma maximises: overall, balanced, harmonic or source-floor; default overall, with folds "
            "balanced.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(
            "--floor",
            min=0,
            max=1,
            help="Accuracy of the source model on absent classes, for source-floor with oracle or val.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns", help="Columns of the folds that compete: pseudo (default) or all.", rich_help_panel=CHOICE
        ),
    ] = None,
    reduce: Annotated[
        str | None, typer.Option("--reduce", help="Over the folds: mean (default) or median.", rich_help_panel=CHOICE)
    ] = None,
    prior: Annotated[
        Path | None,
        typer.Option(
            "--prior", metavar="JSON", help="Target class shares {class: share}; default equal.", rich_help_panel=CHOICE
        ),
    ] = None,
    smoothing: Annotated[
        float | None,
        typer.Option("--smoothing", help="Count added to every class, for prior; default 1.", rich_help_panel=CHOICE),
    ] = None,
    head: Annotated[
        Path | None,
        typer.Option(
            "--head",
            metavar="FILE",
            help="Checkpoint (safetensors, pt), or npz, npy with the head's weight (K, D) and bias (K,), for "
            "weight-align.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option("--layer", help="Name of the head in --head, where it cannot be told.", rich_help_panel=CHOICE),
    ] = None,
    bic_on: Annotated[
        str | None,
        typer.Option("--bic-on", help="Group that bic maps: absent (default) or seen.", rich_help_panel=CHOICE),
    ] = None,
    group_temperature: Annotated[
        float | None,
        typer.Option(
            "--group-temperature",
            help="T of the absent scores for temperature-per-group, where it is not to be fitted.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    temperature: Annotated[
        bool,
        typer.Option(
            "--temperature",
            help="Also fit one temperature on held-out seen data: confidence only, no prediction changes.",
            rich_help_panel=CHOICE,
        ),
    ] = False,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out",
            metavar="FILE",
            help="Data for --temperature; default a fifth of FILE.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    allow_absent_labels: Annotated[
        bool,
        typer.Option(
            "--allow-absent-labels",
            help="Let alg, ratio-pcv and prior see labels of absent classes, as the published code does (a leak).",
            rich_help_panel=GROUPS,
        ),
    ] = False,
    input: InputOpt = None,
    nan: NanOpt = "error",
    logit_prefix: PrefixOpt = "logit_",
    logit_cols: ColsOpt = None,
    label_col: LabelColOpt = None,
    id_col: IdColOpt = None,
    split: SplitOpt = None,
    bootstrap: Annotated[
        int,
        typer.Option(
            "--bootstrap",
            min=0,
            help=f"Resamples of the interval of gamma, at least {FEWEST}; 0: no interval.",
            rich_help_panel=RUN,
        ),
    ] = 1000,
    seed: SeedOpt = 0,
    chunk_rows: ChunkOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Choose gamma from scores alone and write it to a calibration file, with all that it rests on."""
    from ft_calibrate.fold_inputs import read_fold_file
    from ft_calibrate.methods import METHODS
    from ft_calibrate.streaming import fit_file
    from ft_calibrate.table_checks import IdCollector

    how: dict[str, Any] = {
        "input": input,
        "nan": nan,
        "options": table_options(logit_prefix, logit_cols, label_col, id_col, split),
    }
    of_methods = {
        "val": val, "criterion": criterion, "floor": floor, "fold_file": fold_file or None, "columns": columns,
        "reduce": reduce, "gamma": gamma, "rate": rate, "prior": prior, "smoothing": smoothing, "head": head,
        "layer": layer, "bic_on": bic_on, "group_temperature": group_temperature,
    }  # fmt: skip
    given = {name: value for name, value in of_methods.items() if value is not None}
    _check_options(method, METHODS, given)
    if out.suffix.lower() != ".json":
        raise UserError("a calibration is a .json file", where="--out", given=out, remedy="name it gamma.json, say")
    check_out(out, [table, val, held_out, head, prior, *(fold_file or ()), seen, absent])
    if 0 < bootstrap < FEWEST:
        raise UserError("too few resamples", where="--bootstrap", given=bootstrap, remedy=f"0 or at least {FEWEST}")
    if held_out is not None and not temperature:
        raise UserError("--held-out needs --temperature", remedy="add --temperature")
    training = opened(table, quiet, **how)
    groups = groups_for(training, seen, seen_from_labels, absent)
    data = training if val is None else opened(val, quiet, classes=training.classes, **how)
    if method == "rate" and val is None:
        _refuse_seen_only(training, groups)
    folds = [read_fold_file(path, groups, input=data.kind) for path in fold_file or ()]
    ids = IdCollector()
    fitted = partial(
        fit_file,
        data,
        groups,
        method,
        remaining=remaining,
        allow_absent_labels=allow_absent_labels,
        temperature=temperature,
        held_out=None if held_out is None else opened(held_out, quiet, classes=training.classes, **how),
        rows=chunk_rows,
        each=lambda piece: ids.add(piece.ids),
        sources=[path.name for path in fold_file or ()] + ([head.name] if head else []),
        prior=None if prior is None else _prior(prior),
        folds=folds or None,
        n_bootstrap=bootstrap,
        seed=seed,
        **{name: value for name, value in given.items() if name in DIRECT},
        **({} if head is None else _head(head, groups.num_classes, layer)),
    )
    record = _told_in_options(fitted, method, val)
    record = replace(record, notes=(*record.notes, *_fold_notes(record)))
    shared: int | None = 0
    if val is not None:
        shared = shared_ids(training, ids_of(training, chunk_rows), data, ids)
    record.write(out)
    if as_json:
        print_json({**record.to_dict(), "out": out, "duplicate_ids": shared, "dropped_rows": data.dropped})
        return
    counts = f"{len(record.seen)} seen, {len(record.absent)} absent, {len(record.remaining)} remaining classes"
    typer.echo(sentence(record))
    typer.echo(f"{counts}; {record.n_train} rows" + (f", {data.dropped} dropped" if data.dropped else ""))
    if record.per_fold_gamma:
        typer.echo("per fold: " + ", ".join(f"{g:.4g}" for g in record.per_fold_gamma))
    if record.method == "ratio-pcv" and record.per_fold_gamma:
        ratios = ", ".join(f"{m:.4g}" for m in record.details["multipliers"])
        typer.echo(
            f"gamma_ALG = {record.details['gamma_alg']:.4g}, times the ratios gamma / ALG of the folds: {ratios}"
        )
    if record.confidence:
        c = record.confidence
        before_after = f"ECE {c['ece_before']:.4f} -> {c['ece_after']:.4f} on {c['data']}"
        typer.echo(f"temperature = {record.temperature:.4g} (confidence only): {before_after}")
    for note in record.notes:
        typer.echo(f"note: {note}")
    typer.echo(str(out))


def _check_options(method: str, methods: Iterable[str], given: Iterable[str]) -> None:
    """Refuse an option that another method is for, and an unknown method, before any file is read."""
    from vfm_core.errors import unknown_name

    if method not in methods:
        raise unknown_name("method", method, methods, where="--method")
    for name in given:
        option = "--" + name.replace("_", "-")
        if method not in OWNERS[option]:
            raise UserError(
                f"{option} is for --method {', '.join(OWNERS[option])}",
                given=f"--method {method}",
                remedy=f"leave {option} out",
            )
    unread = [name for name in given if name in ("val", "criterion")]
    if "group_temperature" in given and unread:
        raise UserError(f"--{unread[0]} chooses nothing: --group-temperature is given", remedy="leave one of them out")


def _told_in_options(fitted: Callable[[], Calibration], method: str, val: Path | None) -> Calibration:
    """Fit, with errors that name options instead of the arguments of the Python interface."""
    try:
        return fitted()
    except UserError as e:
        remedy = e.remedy
        if method in ON_LABELS and val is None and "absent classes" in e.what:
            remedy = "give labelled samples of all classes with --val FILE" + (f", or {remedy}" if remedy else "")
        elif e.where == "folds":
            remedy = "give the scores of pseudo models with --fold-file, or let ft-calibrate pcv train them"
        elif e.where == "head_weight":
            remedy = "give the head's weight (K, D) with --head FILE"
        raise UserError(e.what, where=ARGUMENTS.get(str(e.where), e.where), given=e.given, remedy=remedy) from e


def _refuse_seen_only(table: TableFile, groups: ClassGroups) -> None:
    """Refuse fine-tuning data for the method rate: their share of absent samples is 0, not the expected one."""
    import numpy as np

    labels = table.labels()
    if labels is not None and len(groups.absent) and np.isin(labels, groups.seen).all():
        raise UserError(
            "method rate needs target data, and every label here is of a seen class",
            where=table.path,
            remedy="give the unlabelled target logits with --val FILE",
        )


def _fold_notes(record: Calibration) -> list[str]:
    """What makes a gamma from folds unsure."""
    if record.method not in ON_FOLDS or not record.per_fold_gamma:
        return []
    notes = []
    if len(record.per_fold_gamma) < 2:
        notes.append("a single fold counts: how much gamma varies over folds is unknown")
    alg = record.details["gamma_alg"]
    for gamma, ratio in zip(record.per_fold_gamma, record.details["multipliers"]):
        if ratio and abs(gamma / ratio) < NEAR_ZERO * abs(alg):
            gap = f"{gamma / ratio:.2g}, near zero beside {alg:.4g} of the real model"
            notes.append(f"the average logit gap of the fold with gamma {gamma:.4g} is {gap}: its ratio is unreliable")
    return notes


def _prior(path: Path) -> dict[str, float]:
    import json

    try:
        shares = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(share) for name, share in shares.items()}
    except (ValueError, AttributeError, TypeError) as e:
        raise UserError("not a JSON object of class shares", where=path, given=e, remedy='{"owl": 0.2, ...}') from e


def _head(path: Path, num_classes: int, layer: str | None) -> dict[str, Any]:
    from ft_calibrate.head_arrays import read_head

    weight, bias = read_head(path, num_classes, layer)
    return {"head_weight": weight, "head_bias": bias}

"""Verbs on files of scores: fit (in its own file), apply, curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from vfm_core.cli import DebugOpt, JsonOpt, QuietOpt, examples, print_json, print_table
from vfm_core.errors import UserError

from ft_calibrate.cli import (
    app,
    logit_fit,  # noqa: F401 - adds the verb fit
)
from ft_calibrate.cli.logit_options import (
    FILE,
    NPZ,
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
    from ft_calibrate.inputs import InputKind
    from ft_calibrate.record import Calibration


@app.command(
    epilog=examples(
        "ft-calibrate apply new_logits.parquet --calibration gamma.json -o pred.parquet",
        "ft-calibrate apply test.npz --calibration gamma.json --train train.npz -o pred.csv --json",
    )
)
def apply(
    table: Annotated[Path, typer.Argument(metavar="FILE", help=f"Scores of new data; labels are optional. {NPZ}")],
    calibration: Annotated[Path, typer.Option("--calibration", metavar="JSON", help="What `ft-calibrate fit` wrote.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Predictions: .parquet, .feather, .csv, .tsv or .npz.")
    ],
    train: Annotated[
        Path | None,
        typer.Option(
            "--train",
            metavar="FILE",
            help="The data that chose gamma: warn of samples that are in both.",
            rich_help_panel=FILE,
        ),
    ] = None,
    average: Annotated[
        str, typer.Option("--average", help="Accuracies: micro (over samples) or macro (over classes).")
    ] = "micro",
    input: InputOpt = None,
    nan: NanOpt = "error",
    logit_prefix: PrefixOpt = "logit_",
    logit_cols: ColsOpt = None,
    label_col: LabelColOpt = None,
    id_col: IdColOpt = None,
    split: SplitOpt = None,
    chunk_rows: ChunkOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Predict with a calibration: classes, groups, confidences; with labels also the accuracies before and after."""
    from ft_calibrate.applying import apply_file
    from ft_calibrate.prediction_files import check_suffix
    from ft_calibrate.record import read_calibration
    from ft_calibrate.tables import file_sha256

    check_out(out, [table, calibration, train])
    record = read_calibration(calibration)
    check_suffix(out)
    how: dict[str, Any] = {"nan": nan, "options": table_options(logit_prefix, logit_cols, label_col, id_col, split)}
    how["input"] = input
    kind = {} if input else {"input": _kind_like(record, table, how)}
    data = opened(table, quiet, classes=record.classes, **how | kind)
    found = apply_file(
        data, record, out, rows=chunk_rows, average=average,
    )  # fmt: skip
    shared: int | None = 0
    if train is not None:
        training = opened(train, quiet, **how)
        shared = shared_ids(training, ids_of(training, chunk_rows), data, found.ids)
        if record.input_sha256 and file_sha256(train) != record.input_sha256:
            typer.echo(f"note: {train.name} is not the file that gamma was chosen on (other SHA-256)", err=True)
    if as_json:
        values = {name: value for name, value in vars(found).items() if name != "ids"}
        gamma = {name: getattr(record, name) for name in ("gamma", "method", "criterion", "chosen_on", "oracle",
                                                          "uses_absent_labels", "uses_test_labels")}  # fmt: skip
        extra = {"out": out, "dropped_rows": data.dropped, "duplicate_ids": shared, "calibration": gamma}
        print_json({**values, **extra})
        return
    typer.echo(sentence(record))
    dropped = f", {data.dropped} rows with NaN or inf dropped" if data.dropped else ""
    groups = "absent or remaining" if record.remaining and record.remaining_mode == "absent" else "absent"
    changed = f"{found.changed} predictions changed, {found.to_absent} of them to {groups} classes"
    typer.echo(f"{found.rows} rows{dropped}; {changed}")
    before, after = found.predicted["before"], found.predicted["after"]
    print_table([{"predicted as": w, "before": before[w], "after": after[w]} for w in before if before[w] + after[w]])
    if found.before is not None and found.after is not None and found.intervals is not None:
        sizes = [f"{name[2:]}: {int(n)} samples" for name, n in found.after.items() if name.startswith("n_") and n]
        after_what = f"{record.effect()} (by {record.method})"
        typer.echo(f"Accuracies ({average}) before: as given; after: {after_what}; {', '.join(sizes)}")
        ends = {k: f"{v.low:.3f} to {v.high:.3f}" for k, v in found.intervals.items() if v.low == v.low}
        print_table(
            [
                {"accuracy": key, "before": value, "after": found.after[key]}
                | ({"95 % (after)": ends.get(key, "")} if average == "micro" else {})
                for key, value in found.before.items()
                if not key.startswith("n_")
            ]
        )
    typer.echo(str(out))


@app.command(
    epilog=examples(
        "ft-calibrate curve test.npz --seen seen.txt --out curve/",
        "ft-calibrate curve test.parquet --seen-from-labels --train train.npz --calibration pcv.json --out curve/",
    )
)
def curve(
    table: Annotated[Path, typer.Argument(metavar="FILE", help=f"Scores of labelled data of all classes. {NPZ}")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for curve.csv and curve.png.")],
    seen: SeenOpt = None,
    seen_from_labels: SeenFromLabelsOpt = False,
    absent: AbsentOpt = None,
    remaining: RemainingOpt = "absent",
    train: Annotated[
        Path | None,
        typer.Option(
            "--train",
            metavar="FILE",
            help="Fine-tuning data: mark the average logit gap; with --seen-from-labels, its labels are the seen "
            "classes.",
            rich_help_panel=FILE,
        ),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(
            "--before",
            metavar="FILE",
            help="Scores of the source model on the same data: the floor of the criterion source-floor.",
            rich_help_panel=FILE,
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option("--calibration", metavar="JSON", help="Mark this gamma too; repeat it.", rich_help_panel=FILE),
    ] = None,
    input: InputOpt = None,
    nan: NanOpt = "error",
    logit_prefix: PrefixOpt = "logit_",
    logit_cols: ColsOpt = None,
    label_col: LabelColOpt = None,
    id_col: IdColOpt = None,
    split: SplitOpt = None,
    chunk_rows: ChunkOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Draw the exact seen-unseen curve, its area (AUSUC), and every gamma one could choose, marked by what chose it."""
    from vfm_core.files import write_json

    from ft_calibrate.gamma_choices import choice_rows, choices_on, curve_picture, from_calibration
    from ft_calibrate.record import read_calibration
    from ft_calibrate.streaming import curve_file, fit_file
    from ft_calibrate.table_checks import IdCollector

    inputs = [table, train, before, *(calibration or ()), seen, absent]
    check_out(out, inputs, "curve.csv", "curve.png", "curve.json")
    how: dict[str, Any] = {
        "input": input,
        "nan": nan,
        "options": table_options(logit_prefix, logit_cols, label_col, id_col, split),
    }
    if seen_from_labels and train is None:
        raise UserError(
            "the labels of which data name the seen classes?",
            where="--seen-from-labels",
            given=f"{table.name} alone, which is to have labels of all classes",
            remedy="give --train FILE, the fine-tuning data",
        )
    data = opened(table, quiet, **how)
    training = None if train is None else opened(train, quiet, classes=data.classes, **how)
    groups = groups_for(data, seen, seen_from_labels, absent, training)
    ids, training_ids = IdCollector(), IdCollector()
    found = curve_file(data, groups, remaining, chunk_rows, lambda piece: ids.add(piece.ids))
    floor = None
    if before is not None:
        source = opened(before, quiet, classes=data.classes, **how)
        floor = curve_file(source, groups, remaining, chunk_rows).at(0.0).unseen
    choices = choices_on(found, table.name, floor)
    shared: int | None = 0
    if training is not None:
        record = fit_file(
            training, groups, "alg", remaining=remaining, rows=chunk_rows, n_bootstrap=0,
            each=lambda piece: training_ids.add(piece.ids),
        )  # fmt: skip
        choices.insert(1, from_calibration(record, "alg"))
        shared = shared_ids(training, training_ids, data, ids)
    for path in calibration or ():
        choices.append(from_calibration(read_calibration(path), path.stem))
    rows = choice_rows(found, choices)
    csv_file = found.to_csv(out / "curve.csv")
    picture = curve_picture(found, choices, out / "curve.png", table.name)
    summary = {
        "ausuc": found.ausuc, "n_seen": found.n_seen, "n_absent": found.n_unseen, "n_remaining": found.n_rest,
        "points": len(found), "choices": rows, "source_floor": floor, "duplicate_ids": shared,
        "dropped_rows": data.dropped, "data": table, "seen": groups.names(groups.seen),
        "absent": groups.names(groups.absent), "remaining": groups.names(groups.remaining), "remaining_mode": remaining,
    }  # fmt: skip
    write_json(out / "curve.json", summary)
    _warn_small({"seen": found.n_seen, "absent": found.n_unseen})
    if as_json:
        print_json({**summary, "files": [csv_file, *([picture] if picture else []), out / "curve.json"]})
        return
    typer.echo(
        f"AUSUC = {found.ausuc:.4f} on {table.name} ({found.n_seen} seen, {found.n_unseen} absent samples; uses their "
        "labels, no gamma)"
    )
    typer.echo(f"Accuracies on {table.name} (95 % interval) at each gamma, and what chose it:")
    print_table([_with_intervals(row) for row in rows])
    typer.echo("\n".join(str(path) for path in (csv_file, picture) if path))


def _with_intervals(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `choice_rows` for people: each interval stands behind its accuracy."""
    ends = {key: value for key, value in row.items() if key.endswith(" 95 %")}
    shown = {key: value for key, value in row.items() if key not in ends}
    for key, interval in ends.items():
        name = key.removesuffix(" 95 %")
        if interval is not None:
            shown[name] = "{:.3f} ({:.3f} to {:.3f})".format(row[name], *interval)
    return shown


def _kind_like(record: Calibration, table: Path, how: dict[str, Any]) -> InputKind | None:
    """Probabilities when gamma was chosen on the log of probabilities and the first rows are probabilities too."""
    if record.input_kind != "prob":
        return None
    from ft_calibrate.inputs import looks_like_probabilities

    first = next(opened(table, True, classes=record.classes, **how).chunks())
    return "prob" if looks_like_probabilities(first.logits) else None


def _warn_small(counts: dict[str, int]) -> None:
    import logging

    from ft_calibrate.metrics import FEW

    for group, n in counts.items():
        if n < FEW:
            text = "no sample" if n == 0 else f"only {n} samples"
            logging.getLogger(__name__).warning("%s of the %s classes: their accuracies are uncertain", text, group)

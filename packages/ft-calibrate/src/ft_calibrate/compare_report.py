"""The report of a comparison: the table, the seen-unseen curves with the chosen gammas, and what the words mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vfm_core.report import Report, house_style
from vfm_core.runs import RunDir

from ft_calibrate.compare_cells import CALIBRATIONS
from ft_calibrate.compare_rows import BASELINE, display
from ft_calibrate.compare_units import SOURCE, is_upper_bound
from ft_calibrate.skipped_images import SKIPPED, read_skipped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ft_calibrate.compare_units import Context
    from ft_calibrate.comparison import Cell

__all__ = ["curves_figure", "explanations", "sweep_figure", "write_report"]

_MARKERS = {"none": "o", "alg": "s", "pcv": "^", "ratio-pcv": "v", "oracle": "*"}


def write_report(
    run: RunDir,
    context: Context,
    cells: Sequence[Cell],
    records: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
    title: str,
    facts: Mapping[str, Any],
    markdown: bool = False,
) -> Path:
    """Write ``report.html`` into the run folder.

    Parameters
    ----------
    run : RunDir
        The run.
    context : Context
        Model and data.
    cells : sequence of Cell
        The grid.
    records : mapping
        Finished cells by key.
    rows : sequence of dict
        The table.
    failures : sequence of dict
        Failed units.
    title : str
        Of the report.
    facts : mapping
        Settings of the pseudo cross-validation and of the remaining classes.
    markdown : bool
        Write ``report.md`` too.
    """
    spec = context.source.spec or type(context.source.model).__name__
    subtitle = f"{spec}; {len(context.train)} training rows, {len(context.test)} test rows"
    report = Report(title, subtitle).heading("Results").text(explanations(rows, facts))
    if rows:
        highlight = [name for name in ("Y/Y", "H", "AUSUC") if any(row.get(name) is not None for row in rows)]
        report.table(display(rows), highlight=highlight, caption=_caption(rows))
    left_out = [reason for row in rows for reason in row.get("skipped folds", ())]
    if left_out:
        report.text(
            "Folds that do not count:\n\n" + "\n".join(f"- fold {reason}" for reason in dict.fromkeys(left_out))
        )
    settings = dict.fromkeys(str(dict(cell.setting.labels)) for cell in cells)
    if len(settings) > 1 and rows:
        report.heading("Sweep").figure(sweep_figure(rows), "Area under the seen-unseen curve in every setting.")
    report.heading("Seen-unseen curves")
    report.text(
        "Every point of a curve is one gamma: to the right the seen classes win, to the top the absent ones. "
        "The markers are the gammas that the calibrations chose; curves are those of the first seed."
    )
    for name in settings:
        own = [cell for cell in cells if str(dict(cell.setting.labels)) == name and cell.key in records]
        if own:
            caption = "Seen-unseen curves" + (f", {name}" if len(settings) > 1 else "")
            report.figure(curves_figure(own, records, run.path / "cells"), caption)
    trained = [record for record in run.records() if record.get("kind") == "training"]
    if trained:
        columns = ("recipe", "seed", "fold", "n_train", "seconds")
        report.heading("Trainings").table([{key: record.get(key) for key in columns} for record in trained])
    skipped = read_skipped(run.path / SKIPPED)
    if skipped:
        report.heading("Unreadable images").text(f"{len(skipped)} images could not be read: {SKIPPED}.")
    if failures:
        report.heading("Not in the table").table(
            [{"recipe": f.get("recipe"), "calibration": f.get("calibration"), "why": f["error"]} for f in failures]
        )
    return report.write(run.report_path, markdown=markdown)


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    text = "Mean over seeds; ± is the standard deviation."
    if any(row.get("seeds asked", row["seeds"]) != row["seeds"] for row in rows):
        text += " Where seeds reads 1 of 2, the others failed or are not finished: "
        text += "such a mean does not compare with one over all seeds."
    return text


def explanations(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """What the columns mean, and for every calibration in the table which data chose gamma."""
    used = dict.fromkeys(str(row["calibration"]).partition(":")[0] for row in rows)
    lines = [f"- `{name}`: {CALIBRATIONS[name][0]}; gamma chosen on: {CALIBRATIONS[name][1]}." for name in used]
    references = {str(row["NCM reference"]) for row in rows if row.get("NCM reference")}
    ncm = f" NCM U/U: nearest class mean among absent classes, means from {', '.join(sorted(references))} "
    ncm += "(labels of absent classes, for diagnosis only)." if references else ""
    pcv = ""
    if {"pcv", "ratio-pcv"} & set(used):
        pcv = (
            f" Pseudo cross-validation: {facts['folds']} folds, criterion {facts['criterion']}, "
            f"{facts['val_share']:.0%} of the samples held out."
        )
    intro = (
        "A/B: among test samples of classes A, the share that is right when the classes B compete. S: seen in "
        "fine-tuning, U: absent, Y: all. H: harmonic mean of S/Y and U/Y. AUSUC: area under the seen-unseen curve, "
        "which no gamma changes. ECE: expected calibration error of the softmax (another meaning of the word "
        f"calibration). Differences to `{BASELINE[0]}` without calibration are in brackets with a 95% paired bootstrap "
        "interval over test samples."
    )
    remaining = f" Classes that are neither seen nor absent: {facts['remaining']}."
    return intro + (ncm if references else "") + pcv + remaining + "\n\n" + "\n".join(lines)


def curves_figure(cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]], folder: Path) -> Figure:
    """Curves of all recipes of one setting, first seed, with a marker where each calibration stands."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    seeds = [cell.seed for cell in cells if _style(cell.recipe) == "-"]
    first = seeds[0] if seeds else 0
    shown: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.seed == first or cell.recipe == SOURCE:
            shown.setdefault(cell.recipe, []).append(cell)
    with house_style():
        figure = Figure(figsize=(7.5, 5.2))
        axes = figure.subplots()
        cycle = colormaps["tab20"].colors  # type: ignore[attr-defined]
        marked: set[str] = set()
        for i, (recipe, group) in enumerate(shown.items()):
            style = _style(recipe)
            colour = "#3c4043" if style != "-" else cycle[(2 * i) % 20 + (2 * i // 20) % 2]
            with np.load(folder / f"{group[0].key}.npz", allow_pickle=False) as stored:
                curve = stored["curve"]
            axes.plot(curve[:, 0], curve[:, 1], style, color=colour, label=recipe, linewidth=1.5)
            for cell in group:
                record = records[cell.key]
                name = cell.calibration.partition(":")[0]
                x, y = record.get("S/Y"), record.get("U/Y")
                if x is not None and y is not None:
                    axes.plot(x, y, _MARKERS.get(name, "D"), color=colour, markersize=9 if name == "oracle" else 6)
                    marked.add(name)
        for name in sorted(marked, key=list(CALIBRATIONS).index):
            axes.plot([], [], _MARKERS.get(name, "D"), color="#6b7280", label=f"gamma: {name}")
        axes.set(xlabel="accuracy on seen classes, S/Y", ylabel="accuracy on absent classes, U/Y")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _style(recipe: str) -> str:
    """Dotted for the model before fine-tuning, dashed for upper bounds."""
    return ":" if recipe == SOURCE else "--" if is_upper_bound(recipe) else "-"


def sweep_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """AUSUC of every recipe (uncalibrated, as gamma does not change it) over the settings of a sweep."""
    from matplotlib.figure import Figure

    fixed = list(rows[0])
    axes_names = fixed[: fixed.index("recipe")]
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("AUSUC") is not None:
            point = ", ".join(f"{name}={row[name]}" for name in axes_names)
            values.setdefault(str(row["recipe"]), {}).setdefault(point, row["AUSUC"])
    points = list(dict.fromkeys(point for own in values.values() for point in own))
    with house_style():
        figure = Figure(figsize=(max(6.0, 0.5 * len(points) + 3), 4.2))
        axes = figure.subplots()
        for recipe, own in values.items():
            axes.plot(range(len(points)), [own.get(point, np.nan) for point in points], "o-", label=recipe)
        axes.set_xticks(range(len(points)), points, rotation=40, ha="right", fontsize="small")
        axes.set(ylabel="AUSUC")
        axes.legend(fontsize="small")
    return figure

"""What an experiment says in the end: own numbers, the papers' cells where a person has filled them in, the claims."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from vfm_core.report import Report

from ft_calibrate.compare_rows import display
from ft_calibrate.experiments import Experiment
from ft_calibrate.pcv_folds import settings_of

if TYPE_CHECKING:
    from ft_calibrate.reproduction import Reproduction

__all__ = ["VERDICTS", "experiment_report", "read_reference", "with_reference"]

VERDICTS = {True: "pass", False: "FAIL", None: "not tested"}


def read_reference(name: str) -> dict[str, Any]:
    """The paper's cells of an experiment: null until a person has compared them with the paper.

    Returns
    -------
    dict
        ``paper``, ``table``, ``filled_by``, ``note`` and ``cells``: row -> column -> number or None.
    """
    text = files("ft_calibrate").joinpath(f"reference_cells/{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def with_reference(rows: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows for people, with the paper's number beside the own one where ``reference`` holds one."""
    shown = []
    for row, line in zip(rows, display(rows), strict=True):
        cells = reference["cells"].get(f"{row['recipe']} + {row['calibration']}", {})
        full: dict[str, Any] = {}
        for column, value in line.items():
            full[column] = value
            if cells.get(column) is not None:
                full[f"{column} (paper)"] = cells[column]
        shown.append(full)
    return shown


def experiment_report(
    experiment: Experiment, found: Reproduction, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> Report:
    """Put the report of an experiment together; arguments as in `reproduce`."""
    subtitle = f"{experiment.paper}; {config['model']}" + (
        "; trial run: the numbers mean nothing" if config["quick"] else ""
    )
    report = Report(experiment.title, subtitle).heading("Results")
    filled = any(v is not None for cells in found.reference["cells"].values() for v in cells.values())
    note = "Cells of the paper stand beside ours." if filled else "No cell of the paper has been filled in yet."
    report.text(f"Own numbers, mean over {len(found.cases)} target domains; ± is the spread over them. {note}")
    if found.rows:
        report.table(with_reference(found.rows, found.reference), highlight=["Y/Y", "AUSUC"])
    report.heading("Claims of the paper")
    report.table([{**check, "holds": VERDICTS[check["holds"]]} for check in found.checks])
    report.heading("Target domains")
    for case, rows in found.cases.items():
        report.heading(case, level=3).text(f"Curves and trainings: [{case}/report.html]({case}/report.html)")
        if rows:
            report.table(display(rows))
    report.heading("Settings").text(f"From: {experiment.settings_from}.")
    report.table([{"setting": key, "value": str(value)} for key, value in settings_of(settings).items()])
    if found.failures:
        report.heading("Failed").table([{"case": f["case"], "why": f["error"]} for f in found.failures])
    return report

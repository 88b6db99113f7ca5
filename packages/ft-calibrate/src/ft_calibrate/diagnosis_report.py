"""The report folder of a diagnosis: summary.json, report.html (self-contained), curve.csv and the figures as PNG.

Ours. Tables and figures are those of FTC (arXiv 2409.16223); every number stands beside its gamma, the data that chose
it, and whether labels of absent classes were used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.report import Report
from vfm_core.runs import writable_folder, writing

from ft_calibrate import figures, figures_features
from ft_calibrate.figure_style import save_png
from ft_calibrate.projection import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ft_calibrate.diagnosis import Diagnosis, Progress

# File, how it is drawn, what it shows, and why it may be missing.
FIGURES: dict[str, tuple[Callable[[Diagnosis], Figure | None], str, str]] = {
    "curve.png": (
        figures.curve_figure,
        "Left: accuracy on absent classes against accuracy on seen classes as gamma goes from -inf to +inf. Right: the "
        "same accuracies against gamma.",
        "needs labelled test samples of seen and absent classes",
    ),
    "nn_vs_ncm.png": (
        figures.nn_vs_ncm_figure,
        "A1: accuracy before and after fine-tuning with the head, and with the nearest class mean of the features. A "
        "fall on the left with no fall on the right is a matter of logit scale.",
        "needs the model before fine-tuning (--before)",
    ),
    "absent_among_absent.png": (
        figures.absent_figure,
        "A2: absent samples classified among the absent classes only, and whether seen and absent samples are told "
        "apart, with and without gamma.",
        "needs labelled test samples of absent classes",
    ),
    "logit_gap.png": (
        figures.logit_gap_figure,
        "A3: where seen and absent samples lie on the margin between the largest seen and the largest absent logit, "
        "and the scale of the logits of the two groups.",
        "needs a seen and an absent class",
    ),
    "delta_w_cosine.png": (
        figures_features.cosine_figure,
        "A4: cosines between the changes of the head rows of all pairs of classes.",
        "needs both heads (--model-before and --model-after)",
    ),
    "margin.png": (
        figures.margin_figure,
        "A5: for absent test samples, the logit of the true class and the largest logit of another absent class.",
        "needs labelled test samples of two absent classes",
    ),
    "head_norms.png": (
        figures_features.norms_figure,
        "A6: norms of the head rows of seen and absent classes.",
        "needs head weights (--model-after, and --model-before to compare)",
    ),
    "feature_movement.png": (
        figures_features.movement_figure,
        "A7: mean distances of normalised features to class, group and overall means, and how far class means moved.",
        "needs features (--features)",
    ),
    "tsne.png": (figures_features.projection_figure, "A8: test features in the plane.", "needs features (--features)"),
}

_TABLES: dict[str, tuple[str, str]] = {
    "accuracy": ("Accuracy by group", "A/B: samples of group A, classes of B compete. Micro, top-1, [95 % bootstrap]."),
    "gammas": ("Gammas", "What each gamma gives on the test data, and what its choice looked at."),
    "curve": ("Seen-unseen curve", "AUSUC is the area under the curve of U/Y over S/Y."),
    "ncm": (
        "What the features know",
        "Class means and neighbours use labels of absent classes: for diagnosis only, no classifier to deploy.",
    ),
    "nn_vs_ncm": ("Head against class means (A1)", "Changes are paired; class means are for diagnosis only."),
    "absent_among_absent": ("Absent among absent, and seen against absent (A2)", ""),
    "logit_scale": (
        "Logit scale (A3)",
        "non_gt: mean logit of the classes of a group other than the true one; max: largest; softmax_S: mass on S.",
    ),
    "class_relationship": ("Class relationship (A4)", "Mean cosine between changes of head rows."),
    "margin": ("Margin inside U (A5)", "Over absent test samples."),
    "head_norms": ("Head norms (A6)", "Mean L2 norm of the head rows, intervals over classes."),
    "feature_movement": (
        "Feature distances (A7)",
        "Euclidean distance of normalised features; the overall mean is that of the training data where given. "
        "Diagnosis only: class means use labels of absent classes.",
    ),
    "class_mean_movement": ("Movement of class means (A7)", "Distance between normalised class means."),
    "separation": (
        "Do S and U separate? (A8)",
        "Silhouettes near 0: no separation. mixed_neighbours: share of classes whose nearest class is of the other "
        "group, beside what random groups would give.",
    ),
    "accuracy_all": ("All accuracies", "Micro and macro (class mean), top-1 and top-5."),
}

_FIGURE_OF = {
    "gammas": "curve.png",
    "nn_vs_ncm": "nn_vs_ncm.png",
    "absent_among_absent": "absent_among_absent.png",
    "logit_scale": "logit_gap.png",
    "class_relationship": "delta_w_cosine.png",
    "margin": "margin.png",
    "head_norms": "head_norms.png",
    "feature_movement": "feature_movement.png",
    "separation": "tsne.png",
}


def write_report(
    diagnosis: Diagnosis, folder: str | Path, *, projection: str = "tsne", progress: Progress | None = None
) -> Path:
    """Write the report folder.

    Parameters
    ----------
    diagnosis
        What to report.
    folder
        Made when absent. Files of an earlier report that this one does not have are removed.
    projection
        ``"tsne"`` or ``"pca"``.
    progress
        Wraps the list of figures: ``(iterable, total) -> iterable``.

    Returns
    -------
    Path
        Of report.html.

    Raises
    ------
    UserError
        Unknown projection, or a folder that cannot be written.
    """
    if projection not in METHODS:
        from vfm_core.errors import unknown_name

        raise unknown_name("projection", projection, METHODS, where="--projection")
    folder = writable_folder(folder)
    with writing(folder):
        drawn = _draw(diagnosis, folder, projection, progress)
        diagnosis.curves["after"].to_csv(folder / "curve.csv")
        diagnosis.to_json(folder / "summary.json")
        return _page(diagnosis, drawn).write(folder / "report.html")


def _draw(diagnosis: Diagnosis, folder: Path, projection: str, progress: Progress | None) -> dict[str, Path]:
    """Paths of the figures that could be drawn, by name."""
    drawn = {}
    names: Iterable[str] = FIGURES if progress is None else progress(list(FIGURES), len(FIGURES))
    for name in names:
        draw, _, lacking = FIGURES[name]
        if name == "tsne.png":
            figure = figures_features.projection_figure(diagnosis, projection)
        else:
            figure = draw(diagnosis)
        if figure is None:
            diagnosis.skipped[name] = lacking
            with contextlib.suppress(FileNotFoundError):
                (folder / name).unlink()
            continue
        drawn[name] = save_png(figure, folder / name)
        diagnosis.skipped.pop(name, None)
    return drawn


def _page(diagnosis: Diagnosis, drawn: dict[str, Path]) -> Report:
    groups, curve = diagnosis.inputs.groups, diagnosis.curves["after"]
    sizes = f"{len(groups.seen)} seen, {len(groups.absent)} absent"
    if len(groups.remaining):
        sizes += f", {len(groups.remaining)} remaining ({diagnosis.inputs.remaining})"
    samples = f"{curve.n_seen} seen and {curve.n_unseen} absent test samples"
    report = Report(f"Verdict: {diagnosis.verdict}", f"{groups.num_classes} classes ({sizes}), {samples}")
    report.heading("Verdict").text(f"**{diagnosis.sentence}**")
    report.text("\n".join(f"- {_code(step)}" for step in diagnosis.next_steps))
    evidence = _evidence_rows(diagnosis)
    if evidence:
        caption = "The differences behind the verdict, over absent test samples; SE from paired bootstrap resamples."
        report.table(evidence, caption=caption)
    if diagnosis.notes:
        report.text("\n".join(f"- {note}" for note in diagnosis.notes))
    for key, (title, caption) in _TABLES.items():
        picture = drawn.get(_FIGURE_OF.get(key, ""))
        if key not in diagnosis.tables and picture is None:
            continue
        report.heading(title)
        if picture is not None:
            words = FIGURES[_FIGURE_OF[key]][1]
            report.figure(picture, words, alt=title)
        if key in diagnosis.tables:
            report.table(_readable(diagnosis.tables[key]), caption=caption)
    _provenance(report, diagnosis)
    return report


def _evidence_rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    judgement = diagnosis.judgement
    feature = "NCM U/U, after - before" if judgement.evidence == "ncm" else "U/U of the head, after - before"
    gamma = "" if judgement.gamma is None else f" at gamma = {judgement.gamma:.3g}"
    named = (
        ("collapse: U/Y, before - after", judgement.collapse),
        (f"dF: {feature}", judgement.feature_change),
        (f"shortfall: U/Y, before - after{gamma}", judgement.shortfall),
        ("order: U/U of the head, after - before", judgement.order_change),
    )
    return [
        {"difference": name, "value": c.interval, "SE": c.se, "value / SE": c.change / c.se if c.se > 0 else None}
        for name, c in named
        if c is not None
    ]


def _readable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a page: results before provenance, no column of blanks, and what the caption says not in every row."""
    last: tuple[str, ...] = (
        "gamma from",
        "absent labels used",
        "test labels used",
        "plateau",
        "means or neighbours from",
    )
    order = [key for row in rows for key in row]
    if "remark" in order:  # the table of gammas: there the origin comes first
        last = ("plateau", "remark")
    names = sorted(dict.fromkeys(order), key=lambda key: (key in last, order.index(key)))
    page = []
    for row in rows:
        cells = {key: row.get(key) for key in names}
        if isinstance(source := cells.get("means or neighbours from"), str):
            cells["means or neighbours from"] = source.partition(":")[0]
        page.append({key: None if value == "" else value for key, value in cells.items()})
    return [{key: value for key, value in row.items() if any(other[key] is not None for other in page)} for row in page]


def _code(step: str) -> str:
    """Set the command of a next step as code."""
    head, found, command = step.partition("ft-calibrate ")
    if not found:
        return step
    command, comma, tail = command.partition(", and ")
    stop = "." if command.endswith(".") else ""
    command = command.removesuffix(".")
    words, space, rest = command.partition(" writes")
    return f"{head}`ft-calibrate {words}`{space}{rest}{stop}{comma}{tail}"


def _provenance(report: Report, diagnosis: Diagnosis) -> None:
    report.heading("What this rests on")
    rows = [
        {"input": name, "file": entry["path"] or "arrays", "samples": entry["samples"], "SHA-256": entry["sha256"][:16]}
        for name, entry in diagnosis.inputs.hashes.items()
    ]
    report.table(rows, caption="The full hashes are in summary.json.")
    settings = diagnosis.settings
    report.text(
        f"Intervals: 95 % percentile bootstrap of {settings.n_bootstrap} resamples, paired where models are compared, "
        f"within each group's own samples; seed {settings.seed}. Gammas marked *upper bound, not deployable* and class "
        "means use labels that are not there in use."
    )
    if diagnosis.skipped:
        rows = [{"left out": name, "why": why} for name, why in sorted(diagnosis.skipped.items())]
        report.table(rows, caption="What could not be computed.")

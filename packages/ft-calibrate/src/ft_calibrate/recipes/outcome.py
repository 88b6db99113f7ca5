"""What a training did: the accuracy decomposition before, after and calibrated, and the report of the run folder.

Accuracies and gamma_ALG (average logit gap, measured on the training rows) are those of FTC (arXiv 2409.16223); the
report is ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vfm_core.data import ImageDataset
from vfm_core.errors import UserError

from ft_calibrate.calibration import fit_calibration
from ft_calibrate.epoch_log import EpochLog, classifier_of, without_series
from ft_calibrate.groups import ClassGroups, class_groups
from ft_calibrate.metrics import accuracy_decomposition
from ft_calibrate.predict import predict_table
from ft_calibrate.recipes.spec import parse_recipe
from ft_calibrate.target_data import target_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from ft_calibrate.classifier import Classifier
    from ft_calibrate.recipes.run import Run
    from ft_calibrate.record import Calibration

__all__ = ["LoggedAccuracy", "Outcome", "TestAccuracy", "measure", "write_report"]

log = logging.getLogger(__name__)

COLUMNS = ("Y/Y", "S/Y", "U/Y", "S/S", "U/U")


@dataclass(frozen=True)
class Outcome:
    """Measured after a training.

    Attributes
    ----------
    rows : list of dict
        One per model: ``model``, ``gamma`` and accuracies; empty without test data.
    upper_bound : bool
        The training used labels of absent classes: nothing of it can be deployed.
    calibration : Calibration or None
        gamma_ALG on the training rows; None too for an upper bound.
    note : str
        Why there is no calibration.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    calibration: Calibration | None = None
    note: str = ""
    upper_bound: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        gamma = self.calibration.gamma if self.calibration is not None else None
        return {"accuracies": self.rows, "gamma_alg": gamma, "note": self.note, "upper_bound": self.upper_bound}


@dataclass(frozen=True, eq=False)
class TestAccuracy:
    """``validate`` of `fine_tune`: top-1 accuracies on test data, before training and after every epoch.

    Attributes
    ----------
    like : Classifier
        Preprocessing and class names.
    data : ImageDataset
        Labelled test pictures.
    groups : ClassGroups
    batch_size, workers : int
        Of the forward passes.
    """

    __test__ = False  # not a test, whatever its name

    like: Classifier
    data: ImageDataset
    groups: ClassGroups
    batch_size: int = 256
    workers: int = 0
    on_error: Callable[[int, str, UserError], None] | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Accuracies of a model in its present state."""
        classifier = classifier_of(model, self.like)
        return _accuracies(classifier, self.data, self.groups, self.batch_size, self.workers, self.on_error)


def _accuracies(
    classifier: Classifier,
    data: ImageDataset,
    groups: ClassGroups,
    batch_size: int,
    workers: int,
    on_error: Callable[[int, str, UserError], None] | None,
) -> dict[str, float]:
    table = predict_table(classifier, data, batch_size=batch_size, workers=workers, features=False, on_error=on_error)
    return _rounded(accuracy_decomposition(table.logits, table.labels, groups, topk=(1,)))


@dataclass(frozen=True, eq=False)
class LoggedAccuracy:
    """As `TestAccuracy`, from the same look as an `EpochLog`, whose series join the history.

    Attributes
    ----------
    log : EpochLog
    """

    log: EpochLog

    def __call__(self, model: nn.Module, epoch: int, stage: str) -> dict[str, float]:
        """Accuracies and series of a model in its present state."""
        values = self.log(model, epoch, stage)
        accuracies = {name: values.pop(f"accuracy/{name}", float("nan")) for name in COLUMNS}
        return {**accuracies, **values}


def _rounded(accuracies: dict[str, float]) -> dict[str, float]:
    return {name: accuracies[name] for name in COLUMNS}


def measure(
    run: Run,
    source: Classifier,
    train: ImageDataset,
    test: ImageDataset | None,
    *,
    absent: Any = None,
    batch_size: int = 256,
    workers: int = 0,
    on_error: Callable[[int, str, UserError], None] | None = None,
) -> Outcome:
    """Measure gamma_ALG on the training rows and, with test data, the accuracies before, after and calibrated.

    Parameters
    ----------
    run : Run
        The training.
    source : Classifier
        theta_O.
    train, test : ImageDataset
        Training rows of seen classes, and labelled test pictures of all classes.
    absent : sequence, optional
        U; by default all classes that are not seen.
    batch_size, workers, on_error
        As for `predict_table`.

    Returns
    -------
    Outcome
    """
    groups = class_groups(run.classes, run.seen, absent)
    tuned = run.classifier
    upper = parse_recipe(run.recipe).is_upper_bound
    mark = " (upper bound, not deployable)" if upper else ""
    how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "features": False, "on_error": on_error}
    calibration, note = None, ""
    of_seen = np.isin(target_data(train, run.classes).columns, groups.seen)
    try:
        table = predict_table(tuned, train.subset(np.flatnonzero(of_seen)) if not of_seen.all() else train, **how)
        calibration = fit_calibration(table.logits, table.labels, groups, "alg")
    except UserError as error:
        note = str(error)
        log.warning("no calibration: %s", note)
    stored = calibration
    if upper:
        stored, note = None, "labels of absent classes trained the model: an upper bound, not deployable"
    if test is None:
        return Outcome([], stored, note, upper)
    rows = [
        {"model": "source", "gamma": 0.0, **_accuracies(source, test, groups, batch_size, workers, on_error)},
    ]
    table = predict_table(tuned, test, **how)
    after = accuracy_decomposition(table.logits, table.labels, groups, topk=(1,))
    rows.append({"model": run.recipe + mark, "gamma": 0.0, **_rounded(after)})
    if calibration is not None:
        moved = calibration.apply(table.logits, run.classes)
        repaired = accuracy_decomposition(moved, table.labels, groups, topk=(1,))
        rows.append({"model": f"{run.recipe} + ALG{mark}", "gamma": calibration.gamma, **_rounded(repaired)})
    return Outcome(rows, stored, note, upper)


def write_report(run: Run, outcome: Outcome, folder: Path) -> Path:
    """Write ``report.html``: accuracies, the course of the training, and the settings.

    Parameters
    ----------
    run, outcome : Run, Outcome
        What there is to report.
    folder : Path
        The run folder.

    Returns
    -------
    Path
        Of the report.
    """
    from vfm_core.report import Report

    report = Report(f"Fine-tuning: {run.recipe}", f"{len(run.seen)} of {len(run.classes)} classes seen")
    if outcome.rows:
        report.heading("Accuracy on test data")
        report.text(
            "Acc A/B: among test rows of group A, the share whose best class among B is right; S seen, U absent, Y "
            "all. " + _provenance(outcome)
        )
        report.table(outcome.rows, highlight={"Y/Y": "max"})
    elif outcome.calibration is not None:
        report.heading("Calibration").text(_provenance(outcome))
    if outcome.note:
        report.text(f"No calibration: {outcome.note}")
    report.heading("Training")
    figure = _course(run.history)
    report.figure(figure, "Loss and accuracies per epoch; epoch 0 is before training.", "Course of the training")
    report.table([{k: v for k, v in without_series(record).items() if k != "seconds"} for record in run.history])
    report.heading("Settings").table([{"setting": k, "value": _short(v)} for k, v in run.settings.items()])
    return report.write(folder / "report.html")


def _provenance(outcome: Outcome) -> str:
    if outcome.upper_bound:
        return "The training used labels of absent classes: its rows are upper bounds, not deployable."
    if outcome.calibration is None:
        return "No gamma was added."
    return (
        f"gamma = {outcome.calibration.gamma:.4g} is the average logit gap of the fine-tuned model on its training "
        "rows; labels of absent classes were not used. It is stored in `calibration.json`."
    )


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 300 else text[:299] + "…"


def _course(history: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure
    from vfm_core.report import house_style

    with house_style():
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        trained = [r for r in history if "loss" in r]
        left.plot([r["epoch"] for r in trained], [r["loss"] for r in trained], marker="o", markersize=3)
        left.set(xlabel="epoch", ylabel="training loss")
        for name in ("Y/Y", "S/Y", "U/Y"):
            some = [r for r in history if r.get(name) is not None and ("loss" in r or r["stage"] == "start")]
            if some:
                right.plot([r["epoch"] for r in some], [r[name] for r in some], marker="o", markersize=3, label=name)
        right.set(xlabel="epoch", ylabel="accuracy on test data", ylim=(0, 1))
        if right.lines:
            right.legend()
        else:
            right.set_visible(False)
    return figure

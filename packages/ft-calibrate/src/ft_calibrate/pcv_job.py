"""Pseudo cross-validation of a finished fine-tuning: its run folder says recipe, settings and classes.

FTC (arXiv 2409.16223): the pseudo models must be made by exactly the recipe of the real one. Everything is therefore
read from the run folder; only the data, and the source model where the folder does not know it, have to be given.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vfm_core.data import ImageDataset
from vfm_core.errors import UserError
from vfm_core.files import write_json
from vfm_core.report import Report, house_style

from ft_calibrate.curve import seen_unseen_curve
from ft_calibrate.gap import average_logit_gap
from ft_calibrate.groups import ClassGroups, class_groups
from ft_calibrate.pcv_run import PcvResult, pcv_by_retraining
from ft_calibrate.skipped_images import SKIPPED, SkippedImages, write_skipped
from ft_calibrate.target_data import TargetData, target_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from vfm_core.loading import OnError

    from ft_calibrate.classifier import Classifier
    from ft_calibrate.pcv import Fold, GammaEstimate
    from ft_calibrate.recipes.run import Run
    from ft_calibrate.record import Calibration

__all__ = ["PcvOutcome", "pcv_of_run"]

log = logging.getLogger(__name__)

_SETTINGS = (
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "grad_clip",
    "backbone_lr_scale",
    "epochs",
    "batch_size",
    "steps_per_epoch",
    "mixed_precision",
)


@dataclass(frozen=True)
class PcvOutcome:
    """What was found and written.

    Attributes
    ----------
    result : PcvResult
        Gammas and folds.
    calibrations : dict of str to Path
        Method -> file; empty when a single fold was computed.
    left_out : int
        Rows of other classes in the data, which were not looked at.
    report : Path or None
        ``report.html``.
    skipped : dict of str to str
        Pictures that could not be read, and why; they are in ``skipped.csv`` too.
    """

    result: PcvResult
    calibrations: dict[str, Path]
    left_out: int
    report: Path | None
    skipped: dict[str, str]


def pcv_of_run(
    run_folder: str | Path,
    data: ImageDataset,
    *,
    out: str | Path,
    source_model: str | None = None,
    folds: int = 3,
    fold: int | None = None,
    merge: bool = False,
    criterion: str = "balanced",
    columns: Any = "pseudo",
    reduce: Any = "mean",
    remaining: str = "absent",
    val_share: float = 0.2,
    seed: int | None = None,
    executor: str = "local",
    overwrite: bool = False,
    strict: bool = False,
    device: Any = None,
    workers: int = 0,
) -> PcvOutcome:
    """Choose gamma for a fine-tuned model by retraining pseudo models, and write ``calibration.json``.

    Parameters
    ----------
    run_folder : path
        Of ``ft-calibrate train`` or `fine_tune`.
    data : ImageDataset
        The fine-tuning data; rows of other than the seen classes are left out.
    out : path
        Gets ``fold-R/``, ``calibration.json`` (PCV), ``calibration-ratio-pcv.json`` (ours) and ``report.html``.
    source_model : str, optional
        theta_O, where the run folder does not name it.
    seed : int, optional
        Of the pseudo splits and trainings; by default that of the real run.
    folds, fold, merge, criterion, columns, reduce, remaining, val_share, executor, overwrite, strict
        As for `pcv_by_retraining`.
    device, workers
        Where it runs.

    Raises
    ------
    UserError
        No finished run, an unknown source model, another source model than that of the run, no row of a seen class.
    """
    from ft_calibrate.classifier import load_classifier
    from ft_calibrate.fold_marks import refuse_folded
    from ft_calibrate.recipes.run import load_run

    path = Path(run_folder)
    refuse_folded(path, "give the run as it was trained")
    source = None if source_model is None else load_classifier(source_model, device=device or "cpu")
    run = load_run(path, source, device=device or "cpu")
    source = source or _source_of(run, path, device)
    training, source, tuned = _as_trained(run, source)
    if source.fingerprint() != run.settings.get("source", source.fingerprint()):
        raise _another_source(run, path, source_model)
    groups = class_groups(run.classes, run.seen, run.settings.get("absent"))
    rows = target_data(data, run.classes, data.name)
    seen_rows = rows.of(int(column) for column in groups.seen)
    if len(seen_rows) == 0:
        raise UserError("no row of a seen class", where=data.name, given=", ".join(run.seen[:5]))
    if seen_rows.fingerprint() != run.settings.get("data"):
        log.warning("%s: these are not the rows that %s was trained on", data.name, path)
    execution = {"device": device, "workers": workers}
    skipped = SkippedImages()
    fitted = None
    if fold is None:
        fitted = _fitted(tuned, seen_rows, None if strict else skipped, execution)
    gamma_alg = None
    if fitted is not None and len(groups.seen) > 1:
        gamma_alg = average_logit_gap(
            fitted.logits, fitted.labels, groups.seen, groups.absent, classes=run.classes, remaining=remaining
        )
    chosen = {"criterion": criterion, "columns": columns, "reduce": reduce}
    result = pcv_by_retraining(
        source,
        seen_rows.rows,
        run.seen,
        run.recipe,
        folds=folds,
        fold=fold,
        val_share=val_share,
        absent=list(groups.absent),
        remaining=remaining,
        gamma_alg=gamma_alg,
        out=out,
        seed=int(run.settings.get("seed", 0)) if seed is None else seed,
        merge=merge,
        overwrite=overwrite,
        executor=executor,
        strict=strict,
        **chosen,
        **training,
        **execution,
    )
    left_out = len(rows) - len(seen_rows)
    if fold is not None:
        return PcvOutcome(result, {}, left_out, None, result.skipped)
    unreadable = {**result.skipped, **skipped.items}
    if unreadable != result.skipped:
        write_skipped(Path(out) / SKIPPED, unreadable)
    found = _calibrations(result, groups, fitted, {**chosen, "remaining": remaining})
    files = {"pcv": Path(out) / "calibration.json", "ratio-pcv": Path(out) / "calibration-ratio-pcv.json"}
    for method, calibration in found.items():
        calibration.write(files[method])
    estimates = {e.method: e.to_dict() for e in (result.pcv, result.ratio) if e is not None}
    write_json(Path(out) / "summary.json", {"run": str(run_folder), "recipe": run.recipe, **estimates})
    report = _report(result, groups, run, tuned.spec).write(Path(out) / "report.html")
    return PcvOutcome(result, {method: files[method] for method in found}, left_out, report, unreadable)


def _source_of(run: Run, path: Path, device: Any) -> Classifier:
    from ft_calibrate.classifier import load_classifier

    how = dict(run.source)
    if not how.get("spec"):
        remedy = "give it with --source-model"
        raise UserError("the run does not say which model it started from", where=path, remedy=remedy)
    return load_classifier(how.pop("spec"), device=device or "cpu", **how)


def _another_source(run: Run, path: Path, given: str | None) -> UserError:
    if given is not None:
        remedy = "give the model that the run started from"
        return UserError(
            "another source model than that of the run", where="--source-model", given=given, remedy=remedy
        )
    where = run.source.get("source_ckpt") or run.source["spec"]
    remedy = "restore it, or give the model that the run started from with --source-model"
    return UserError("the source model is no longer that of the run", where=where, given=f"run {path}", remedy=remedy)


def _as_trained(run: Run, source: Classifier) -> tuple[dict[str, Any], Classifier, Classifier]:
    """Settings of the run as arguments of `fine_tune`, and both models with the preprocessing it trained with."""
    training = {name: run.settings[name] for name in _SETTINGS if name in run.settings}
    prepared = run.preprocess or source.preprocess
    tuned = replace(run.classifier, preprocess=prepared)
    source = replace(source, class_names=list(run.classes), preprocess=prepared, _fingerprint=None)
    augment = run.settings.get("augment")
    if run.settings.get("transform") is not None:
        remedy = "use pcv_by_retraining in Python, with the same transform"
        raise UserError("the run used a transform of its own", given=run.settings["transform"], remedy=remedy)
    if augment is not None:
        training["augment"] = _augmentation(augment)
    return training, source, tuned


def _augmentation(text: str) -> Any:
    from ft_calibrate.augment import Augmentation

    size = re.search(r"size=(\d+)", text)
    made = Augmentation(size=int(size.group(1))) if size else None
    if made is None or repr(made) != text:
        remedy = "use pcv_by_retraining in Python, with the same augment"
        raise UserError("the run's augmentation is not one of ours", given=text, remedy=remedy)
    return made


def _fitted(tuned: Classifier, rows: TargetData, on_error: OnError | None, execution: Mapping[str, Any]) -> Any:
    from ft_calibrate.extraction import predict_table

    return predict_table(tuned, rows.rows, features=False, on_error=on_error, **execution)


def _calibrations(
    result: PcvResult, groups: ClassGroups, fitted: Any, options: Mapping[str, Any]
) -> dict[str, Calibration]:
    from ft_calibrate.calibration import fit_calibration

    found = {"pcv": fit_calibration(None, None, groups, "pcv", folds=result.folds, **options)}
    if result.ratio is not None:
        labels = np.asarray(fitted.labels)
        found["ratio-pcv"] = fit_calibration(fitted.logits, labels, groups, "ratio-pcv", folds=result.folds, **options)
    return found


def _report(result: PcvResult, groups: ClassGroups, run: Run, spec: str) -> Report:
    report = Report("Gamma by pseudo cross-validation", f"{spec}; recipe {run.recipe}").heading("Gamma")
    estimates = [e for e in (result.pcv, result.ratio) if e is not None]
    report.table(
        [
            {"method": e.method, "gamma": e.gamma, "spread": e.std, "folds": len(e.per_fold), "criterion": e.criterion}
            for e in estimates
        ]
    )
    report.text(
        "No label of an absent class was read. `pcv` is the mean of the gammas that are best for pseudo models, which "
        "saw half of the seen classes; with fewer classes it tends to be too large. `ratio-pcv` (ours) multiplies the "
        "average logit gap of the real model by the ratio that the pseudo models show."
    )
    for estimate in estimates:
        for skipped in estimate.skipped:
            report.text(f"Left out by {estimate.method}: {skipped}")
    numbers = _by_fold(estimates, result.folds)
    per_fold = [
        {"fold": fold.name, "pseudo-seen": ", ".join(map(str, fold.pseudo_seen)), **numbers[fold.name]}
        for fold in result.folds
    ]
    report.heading("Folds").table(per_fold)
    return report.figure(_curves(result, groups), "Accuracy on pseudo-seen and pseudo-absent classes along gamma")


def _by_fold(estimates: Sequence[GammaEstimate], folds: Sequence[Fold]) -> dict[str | None, dict[str, float]]:
    """What each method makes of each fold, by the fold's name; nothing where it leaves the fold out."""
    found: dict[str | None, dict[str, float]] = {fold.name: {} for fold in folds}
    for estimate in estimates:
        skipped = {reason.partition(": ")[0] for reason in estimate.skipped}
        counted = [fold.name for fold in folds if fold.name not in skipped]
        for name, gamma in zip(counted, estimate.gammas, strict=True):
            found[name][f"gamma by {estimate.method}"] = gamma
        for name, ratio in zip(counted, estimate.multipliers, strict=False):
            found[name]["gamma / ALG"] = ratio
    return found


def _curves(result: PcvResult, groups: ClassGroups) -> Figure:
    from matplotlib.figure import Figure

    seen = set(groups.names(groups.seen))
    with house_style():
        figure = Figure(figsize=(7, 4))
        axes = figure.subplots()
        for i, fold in enumerate(result.folds):
            absent = sorted(seen - set(fold.pseudo_seen))
            curve = seen_unseen_curve(
                fold.logits, fold.labels, fold.pseudo_seen, absent, classes=groups.classes, remaining="exclude"
            )
            own: dict[str, Any] = {"color": f"C{i}", "drawstyle": "steps-mid"}  # constant between the breaks
            axes.plot(curve.gamma, curve.seen, label=f"fold {fold.name}: pseudo-seen", **own)
            axes.plot(curve.gamma, curve.unseen, "--", label=f"fold {fold.name}: pseudo-absent", **own)
        axes.axvline(result.pcv.gamma, color="#3c4043", linewidth=1, label="gamma (pcv)")
        axes.set(xlabel="gamma", ylabel="accuracy")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure

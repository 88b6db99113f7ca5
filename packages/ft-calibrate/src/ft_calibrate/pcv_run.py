"""PCV with its retraining: choose gamma without one label of an absent class (FTC, section on pseudo cross-validation).

For r = 1..R: split S at random into pseudo-seen S'_r and pseudo-absent U'_r; split the samples per class
into pseudo-train and pseudo-val; fine-tune the source model theta_O on the pseudo-train samples of S'_r by exactly the
recipe of the real run; then sweep gamma on the pseudo-val samples of S'_r and all samples of U'_r, none of which that
model was trained on. gamma_PCV is the mean of the R best gammas.

The published code evaluates its pseudo models on labelled samples of the true absent classes; this module follows the
paper's definition and never reads them. Ours: the share of pseudo-val samples (80/20) and ratio-PCV.

Every fold is a run folder of its own (``fold-0``, ``fold-1`` ...): folds can be killed and resumed, and computed by
separate jobs, without waiting for each other.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vfm_core.errors import UserError
from vfm_core.executors import make_executor
from vfm_core.runs import RunDir

from ft_calibrate.gap import average_logit_gap
from ft_calibrate.groups import class_groups
from ft_calibrate.pcv import Fold, GammaEstimate, pseudo_cross_validation, ratio_pcv
from ft_calibrate.pcv_folds import FoldPlan, FoldTable, check_choices, fold_table, plan_folds, settings_of
from ft_calibrate.recipes.spec import parse_recipe
from ft_calibrate.skipped_images import SKIPPED, SkippedImages, merge_skipped, write_skipped
from ft_calibrate.target_data import TargetData, named, target_data

__all__ = ["PcvResult", "pcv_by_retraining"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PcvResult:
    """What the pseudo models say.

    Attributes
    ----------
    pcv : GammaEstimate
        gamma_PCV, the mean over the folds.
    ratio : GammaEstimate or None
        Ratio-PCV (ours): mean of gamma_r / ALG_r, times gamma_ALG of the fully fine-tuned model. None when a single
        fold was asked for and no ``gamma_alg`` was given, when no fold's average logit gap is positive, and when
        merging finds no fully fine-tuned model.
    folds : tuple of Fold
        Logits and labels of every pseudo model, from which gammas by other criteria can be read.
    skipped : dict of str to str
        Pictures that could not be read, and why; with ``out`` they are in ``skipped.csv`` too.
    """

    pcv: GammaEstimate
    ratio: GammaEstimate | None
    folds: tuple[Fold, ...]
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """What the folds share; sent once to every worker process."""

    source: Any
    data: TargetData
    seen: tuple[str, ...]
    absent: tuple[str, ...]
    recipe: str
    training: Mapping[str, Any]
    out: Path
    config: Mapping[str, Any]
    overwrite: bool
    strict: bool

    def skips(self, folder: Path) -> SkippedImages | None:
        """What the unit of a folder tells of unreadable pictures."""
        return None if self.strict else SkippedImages(folder / SKIPPED)


def pcv_by_retraining(
    model: Any,
    train: Any,
    seen: Any,
    recipe: str = "ft",
    *,
    folds: int = 3,
    fold: int | None = None,
    val_share: float = 0.2,
    criterion: str = "balanced",
    columns: Literal["pseudo", "all"] = "pseudo",
    reduce: Literal["mean", "median"] = "mean",
    absent: Any = None,
    remaining: str = "absent",
    gamma_alg: float | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    merge: bool = False,
    overwrite: bool = False,
    executor: str = "local",
    strict: bool = False,
    **training: Any,
) -> PcvResult:
    """Choose gamma by pseudo cross-validation, retraining one pseudo model per fold.

    Parameters
    ----------
    model : nn.Module or Classifier
        theta_O, the model before the real fine-tuning. It is not changed.
    train : (Tensor, Tensor) or ImageDataset
        The fine-tuning data: labels in S only.
    seen, absent
        Names, columns or masks; ``absent=None``: every class that is not seen.
    recipe : str
        The recipe of the real run, as for `fine_tune`.
    folds : int
        R.
    fold : int, optional
        Only this fold, 0..R-1: for separate jobs. The estimates then rest on it alone.
    val_share : float
        Share of each pseudo-seen class's samples that is held out.
    criterion : {"balanced", "overall", "harmonic", "source-floor"}
        What the best gamma of a fold maximises. ``source-floor``: overall accuracy, subject to an accuracy on U'_r of
        at least that of theta_O.
    columns : {"pseudo", "all"}
        ``"pseudo"``: the sweep is over the logits of S. ``"all"``: U'_r and U both count as absent.
    reduce : {"mean", "median"}
        Over folds.
    remaining : {"absent", "keep", "exclude"}
        Whether classes that are neither seen nor absent count as absent in gamma_ALG.
    gamma_alg : float, optional
        Average logit gap of the really fine-tuned model on ``train``, for ratio-PCV. Without it that model is
        fine-tuned here too, as one more unit (unless a single fold is asked for).
    out : path, optional
        Folder for the folds; a second call finds finished folds done. Without it nothing is kept.
    seed : int
        Of the splits and of every training.
    merge : bool
        Train nothing: put finished folds together, and say which are missing. Without ``gamma_alg`` there is a
        ratio-PCV only where the fully fine-tuned model of an earlier call is there.
    overwrite : bool
        Forget finished folds.
    executor : str
        ``local``, ``local:N`` (N folds at a time) or ``ray``.
    strict : bool
        An unreadable picture raises; otherwise it is left out and listed in ``skipped.csv``.
    **training
        Further arguments of `fine_tune`: the settings of the real run.

    Returns
    -------
    PcvResult

    Raises
    ------
    UserError
        Rows of classes outside S, a recipe that trains on absent classes, a fold out of range, a missing fold when
        merging, another run's folder.
    """
    check_choices(criterion, columns, reduce, remaining)
    source = named(model, train)
    names = tuple(source.class_names or ())
    groups = class_groups(names, seen, absent)
    data = target_data(train, names, "training data")
    if "oracle-ft" in parse_recipe(recipe):
        remedy = "pseudo cross-validation is for recipes that train on the seen classes"
        raise UserError("recipe uses absent classes", where="recipe", given=recipe, remedy=remedy)
    if fold is not None and not 0 <= fold < folds:
        raise UserError("no such fold", where="fold", given=fold, remedy=f"use 0..{folds - 1}")
    if merge and overwrite:
        raise UserError("forget the folds or merge them?", given="merge and overwrite", remedy="give one of them")
    if out is None and merge:
        raise UserError("nothing to merge", where="out", remedy="give the folder that holds the folds")
    seen_names, absent_names = groups.names(groups.seen), groups.names(groups.absent)
    plans = plan_folds(data, seen_names, folds, val_share=val_share, seed=seed)
    wanted = plans if fold is None else [plans[fold]]
    config = {
        "model": source.fingerprint(),
        "data": data.fingerprint(),
        "seen": seen_names,
        "absent": absent_names,
        "recipe": recipe,
        "training": settings_of(training),
        "val_share": val_share,
        "seed": seed,
    }
    with contextlib.ExitStack() as stack:
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        training = {**training, "seed": seed}
        where = (folder, config, overwrite, strict)
        job = _Job(source, data, tuple(seen_names), tuple(absent_names), recipe, training, *where)
        if merge:
            _check_finished(folder, wanted)
        measured = _all_folds(job, wanted, executor)
        if gamma_alg is None and fold is None:
            gamma_alg = _full_gap(job, remaining, merge)
        skipped = merge_skipped(sorted(folder.glob(f"*/{SKIPPED}")))
        write_skipped(folder / SKIPPED, skipped)
    with_floor = columns if criterion == "source-floor" else None
    found = [measured[plan.number].fold(job.absent, names, with_floor) for plan in wanted]
    options: dict[str, Any] = {"criterion": criterion, "columns": columns, "reduce": reduce}
    options |= {"classes": list(names), "seen": seen_names}
    pcv = pseudo_cross_validation(found, **options)
    ratio = None if gamma_alg is None else _ratio(found, gamma_alg, options)
    return PcvResult(pcv, ratio, tuple(found), skipped)


def _ratio(folds: Sequence[Fold], gamma_alg: float, options: Mapping[str, Any]) -> GammaEstimate | None:
    """Ratio-PCV, or None with a warning where no fold has a ratio: plain PCV must not fail with it."""
    try:
        return ratio_pcv(folds, gamma_alg, **options)
    except UserError as error:
        log.warning("no ratio-PCV: %s", error)
        return None


def _check_finished(folder: Path, plans: Sequence[FoldPlan]) -> None:
    missing = [str(p.number) for p in plans if not (folder / f"fold-{p.number}" / "fold.npz").exists()]
    if missing:
        remedy = "run them with --fold, or leave out --merge"
        raise UserError("folds are missing", where=folder, given=", ".join(missing), remedy=remedy)


def _all_folds(job: _Job, plans: Sequence[FoldPlan], executor: str) -> dict[int, FoldTable]:
    measured: dict[int, FoldTable] = {}
    for outcome in make_executor(executor).run(_run_fold, job, plans):
        if outcome.error is not None:
            raise outcome.error
        measured[plans[outcome.index].number] = outcome.value
    return measured


def _run_fold(job: _Job, plan: FoldPlan) -> FoldTable:
    folder = job.out / f"fold-{plan.number}"
    own = {"fold": plan.number, "pseudo_seen": plan.pseudo_seen, "pseudo_absent": plan.pseudo_absent}
    with RunDir(folder, {**job.config, **own}, overwrite=job.overwrite) as run:
        if job.overwrite:
            _forget(folder)
        began = time.perf_counter()
        own_options = (folder, job.training, job.skips(folder))
        table = fold_table(job.source, job.data, plan, job.absent, job.recipe, *own_options)
        if "fold" not in run.done:
            sizes = {"n_train": len(plan.train_rows), "n_val": len(plan.val_rows)}
            run.append({"unit": "fold", **own, **sizes, "seconds": time.perf_counter() - began})
    return table


def _forget(folder: Path) -> None:
    import shutil

    for name in ("fold.npz", SKIPPED):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "training", ignore_errors=True)


def _full_gap(job: _Job, remaining: str, only_read: bool) -> float | None:
    """gamma_ALG of the model that is fine-tuned on all of the training data, as one more resumable unit.

    With ``only_read`` nothing is trained: None, with a warning, where that unit is not finished.
    """
    from ft_calibrate.extraction import predict_table
    from ft_calibrate.recipes import fine_tune

    folder = job.out / "full"
    if only_read and not (folder / "results.jsonl").exists():
        log.warning("no ratio-PCV: %s has no fully fine-tuned model, and no gamma_alg was given", job.out)
        return None
    with RunDir(folder, {**job.config, "remaining": remaining}, overwrite=job.overwrite) as run:
        if job.overwrite:
            _forget(folder)
        if "full" not in run.done:
            options = {**job.training, "absent": list(job.absent), "out": folder / "training"}
            options["on_error"] = on_error = job.skips(folder)
            tuned = fine_tune(job.source, job.data.rows, list(job.seen), job.recipe, **options)
            place = {"workers": job.training.get("workers", 0), "device": job.training.get("device")}
            table = predict_table(tuned.classifier, job.data.rows, features=False, on_error=on_error, **place)
            gap = average_logit_gap(
                table.logits, table.labels, job.seen, job.absent, classes=job.data.classes, remaining=remaining
            )
            run.append({"unit": "full", "gamma_alg": gap})
        return float(next(record["gamma_alg"] for record in run.records() if record["unit"] == "full"))

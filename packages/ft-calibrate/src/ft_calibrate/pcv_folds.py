"""The pseudo splits of PCV and the training of one pseudo model (FTC, section on pseudo cross-validation).

A fold splits S at random into pseudo-seen S'_r and pseudo-absent U'_r, and the samples of every pseudo-seen class into
pseudo-train and pseudo-val (ours: 80/20). Its model is theta_O fine-tuned on the pseudo-train samples; what is kept
of it are its logits on pseudo-val and on all samples of U'_r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.files import atomic_write

from ft_calibrate.curve import CRITERIA, seen_unseen_curve
from ft_calibrate.groups import REMAINING, class_groups
from ft_calibrate.pcv import Fold
from ft_calibrate.target_data import Rows, TargetData

if TYPE_CHECKING:
    from vfm_core.loading import OnError

    from ft_calibrate.classifier import Classifier
    from ft_calibrate.tables import LogitTable

__all__ = [
    "EXECUTION",
    "FoldPlan",
    "FoldTable",
    "check_choices",
    "fold_table",
    "plan_folds",
    "read_fold",
    "settings_of",
    "write_fold",
]

EXECUTION = ("device", "workers", "cache_dir", "callbacks", "validate", "resume", "out", "all_data")
"""Options of a training that say where and how it runs, not what comes out."""


@dataclass(frozen=True, eq=False)
class FoldPlan:
    """Which classes and rows a fold uses; rows are positions in the training data of S.

    Attributes
    ----------
    number : int
        r, from 0.
    pseudo_seen, pseudo_absent : tuple of str
        S'_r and U'_r; together S.
    train_rows : ndarray of int64
        Pseudo-train samples of S'_r.
    val_rows : ndarray of int64
        Pseudo-val samples of S'_r and every sample of U'_r.
    """

    number: int
    pseudo_seen: tuple[str, ...]
    pseudo_absent: tuple[str, ...]
    train_rows: NDArray[np.int64]
    val_rows: NDArray[np.int64]


def check_choices(criterion: str, columns: str = "pseudo", reduce: str = "mean", remaining: str = "absent") -> None:
    """Refuse words that no one knows, before anything is trained.

    Raises
    ------
    UserError
        Naming the option and what it can be.
    """
    for what, given, known in (
        ("criterion", criterion, CRITERIA),
        ("columns", columns, ("pseudo", "all")),
        ("reduce", reduce, ("mean", "median")),
        ("remaining", remaining, REMAINING),
    ):
        if given not in known:
            raise UserError(f"unknown {what}", given=repr(given), remedy=f"use {', '.join(known)}")


def plan_folds(
    data: TargetData, seen: Sequence[str], folds: int = 3, *, val_share: float = 0.2, seed: int = 0
) -> list[FoldPlan]:
    """Draw the pseudo splits of classes and samples.

    Parameters
    ----------
    data : TargetData
        Training data, labels in S only.
    seen : sequence of str
        S, at least 2 classes.
    folds : int
        R.
    val_share : float
        Share of each pseudo-seen class's samples that is held out, in (0, 1); at least one of two or more samples.
    seed : int
        Of both draws. The same seed gives the same folds whatever their number is asked for one by one.

    Raises
    ------
    UserError
        Rows of other classes (leak guard), a share out of range, or too few classes or samples.
    """
    from ft_calibrate.pseudo_splits import per_class_split, pseudo_splits

    if not 0 < val_share < 1:
        raise UserError("share out of range", where="val_share", given=val_share, remedy="use a share such as 0.2")
    if folds < 1:
        raise UserError("no fold", where="folds", given=folds, remedy="use 3")
    number = {name: column for column, name in enumerate(data.classes)}
    outside = np.setdiff1d(data.columns, [number[name] for name in seen])
    if len(outside):
        names = ", ".join(data.classes[c] if c >= 0 else "(no label)" for c in outside[:5])
        remedy = "drop those rows: pseudo cross-validation must not see labels outside the seen classes"
        raise UserError("rows outside the seen classes", where="training data", given=names, remedy=remedy)
    plans = []
    for r, (pseudo_seen, pseudo_absent) in enumerate(pseudo_splits(list(seen), folds, seed)):
        pseudo_seen_columns = [number[name] for name in pseudo_seen]
        labels = np.where(np.isin(data.columns, pseudo_seen_columns), data.columns, -1)
        draw = int(np.random.SeedSequence([seed, r]).generate_state(1)[0])
        train_rows, held = per_class_split(labels, 1 - val_share, seed=draw)
        unheard = np.flatnonzero(labels < 0)  # all of U'_r: this fold's model never trains on it
        if not (len(train_rows) and len(held) and len(unheard)):
            remedy = "two or more samples per seen class are needed"
            raise UserError("too few samples for a pseudo split", where=f"fold {r}", given=len(data), remedy=remedy)
        val_rows = np.sort(np.concatenate([held, unheard]))
        plans.append(FoldPlan(r, tuple(pseudo_seen), tuple(pseudo_absent), train_rows, val_rows))
    return plans


def settings_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training that decide its result, in JSON form (functions by their qualified name)."""
    settings: dict[str, Any] = {}
    for name in sorted(set(training) - set(EXECUTION)):
        value = training[name]
        if value is None or isinstance(value, str | bool | int | float | list | tuple | dict):
            settings[name] = value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            settings[name] = {"type": type(value).__qualname__, **dataclasses.asdict(value)}
        else:
            settings[name] = getattr(value, "__qualname__", type(value).__qualname__)
    return settings


@dataclass(frozen=True, eq=False)
class FoldTable:
    """Logits of one pseudo model.

    Attributes
    ----------
    plan : FoldPlan
        The fold.
    logits, source_logits : ndarray, (n, K)
        Of the pseudo model and of theta_O, on pseudo-val and all of U'_r.
    labels : ndarray of int64, (n,)
        Columns.
    train_logits, train_labels : ndarray
        Of the pseudo model on its own pseudo-train.
    """

    plan: FoldPlan
    logits: NDArray[Any]
    labels: NDArray[np.int64]
    source_logits: NDArray[Any]
    train_logits: NDArray[Any]
    train_labels: NDArray[np.int64]

    def fold(self, absent: Sequence[str], classes: Sequence[str], floor_columns: str | None = None) -> Fold:
        """The fold as `pseudo_cross_validation` takes it.

        Parameters
        ----------
        absent : sequence of str
            The true U, for ``columns="all"``.
        classes : sequence of str
            Names of the K columns.
        floor_columns : {"pseudo", "all"}, optional
            Also work out the floor of ``source-floor``: theta_O's accuracy on U'_r, among these columns.
        """
        floor = None
        if floor_columns is not None:
            moved = [*self.plan.pseudo_absent, *(absent if floor_columns == "all" else ())]
            groups = class_groups(classes, self.plan.pseudo_seen, moved)
            curve = seen_unseen_curve(
                self.source_logits, self.labels, groups.seen, groups.absent, classes=classes, remaining="exclude"
            )
            floor = float(curve.at(0.0).unseen)
        return Fold(
            logits=self.logits,
            labels=self.labels,
            pseudo_seen=list(self.plan.pseudo_seen),
            train_logits=self.train_logits,
            train_labels=self.train_labels,
            absent=list(absent),
            floor=floor,
            name=str(self.plan.number),
        )


def fold_table(
    source: Classifier,
    data: TargetData,
    plan: FoldPlan,
    absent: Sequence[str],
    recipe: str,
    folder: Path,
    training: Mapping[str, Any],
    on_error: OnError | None = None,
) -> FoldTable:
    """Fine-tune one pseudo model, or find it done, and return its logits.

    Parameters
    ----------
    source : Classifier
        theta_O.
    data : TargetData
        Training data of S.
    plan : FoldPlan
        The fold.
    absent : sequence of str
        The true U: absent for the pseudo model too.
    recipe : str
        As for `fine_tune`.
    folder : Path
        Holds ``fold.npz`` when the fold is finished, and ``training/``.
    training : mapping
        Further arguments of `fine_tune`.
    on_error : callable, optional
        Told of unreadable pictures, which are left out; without it the first one raises.
    """
    from ft_calibrate.extraction import predict_table
    from ft_calibrate.recipes import fine_tune

    path = folder / "fold.npz"
    if not path.exists():
        options = {"device": training.get("device"), "workers": training.get("workers", 0), "features": False}
        options["on_error"] = on_error
        train = data.take(plan.train_rows)
        seen, missing = list(plan.pseudo_seen), [*plan.pseudo_absent, *absent]
        own = {**training, "absent": missing, "on_error": on_error}
        run = fine_tune(source, train.rows, seen, recipe, out=folder / "training", **own)
        tuned = run.classifier
        write_fold(
            path,
            lambda rows: predict_table(source, rows, **options),
            lambda rows: predict_table(tuned, rows, **options),
            data,
            plan,
        )
    return read_fold(path, plan)


def read_fold(path: Path, plan: FoldPlan) -> FoldTable:
    """Read what `write_fold` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return FoldTable(plan, **{name: stored[name] for name in stored.files})


def write_fold(
    path: Path,
    before: Callable[[Rows], LogitTable],
    after: Callable[[Rows], LogitTable],
    data: TargetData,
    plan: FoldPlan,
) -> None:
    """Write what is kept of a pseudo model, atomically.

    Parameters
    ----------
    path : Path
        An ``.npz`` file.
    before, after : callable
        Rows -> table, of theta_O and of the pseudo model.
    data : TargetData
        Training data of S.
    plan : FoldPlan
        The fold.
    """
    val, train = data.take(plan.val_rows), data.take(plan.train_rows)
    tuned, source, fitted = after(val.rows), before(val.rows), after(train.rows)
    if tuned.ids != source.ids:  # a picture that could be read only once
        both = set(tuned.ids or ()) & set(source.ids or ())
        tuned, source = (t.subset([i for i, name in enumerate(t.ids or ()) if name in both]) for t in (tuned, source))
    with atomic_write(path) as temporary:
        np.savez(
            temporary,
            logits=np.asarray(tuned.logits),
            labels=np.asarray(tuned.labels),
            source_logits=np.asarray(source.logits),
            train_logits=np.asarray(fitted.logits),
            train_labels=np.asarray(fitted.labels),
        )

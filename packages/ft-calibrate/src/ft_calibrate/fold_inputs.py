"""Files of folds, for pseudo cross-validation on logits alone (FTC, arXiv 2409.16223; the file format is ours)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

from ft_calibrate.groups import ClassGroups, class_groups, label_columns
from ft_calibrate.inputs import InputKind, to_logits
from ft_calibrate.pcv import Fold
from ft_calibrate.table_checks import column_order
from ft_calibrate.tables import open_table

__all__ = ["read_fold_file"]


def read_fold_file(path: str | Path, groups: ClassGroups, *, input: InputKind | None = None) -> Fold:
    """Read the logits of one pseudo model.

    Parameters
    ----------
    path
        An ``.npz`` with ``logits`` (N, K) and ``labels`` (N,) on held-out samples of the pseudo-seen classes and all
        samples of the pseudo-absent ones; ``pseudo_seen`` (names or columns; without it the classes that occur in
        ``train_labels``); for ratio-pcv ``train_logits`` and ``train_labels``; where wanted ``classes``, ``floor`` (the
        source model's accuracy on the pseudo-absent classes) or ``source_logits`` (N, K), from which it follows.
    groups
        The classes of the real model; columns are matched by name.
    input
        What the scores are.

    Returns
    -------
    Fold

    Raises
    ------
    UserError
        Missing arrays, classes that differ, or the errors of `ft_calibrate.tables.open_table`.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise UserError(
            "a fold must be an .npz file", where="--fold-file", given=path, remedy="see its help for the keys"
        )
    table = open_table(path, input=input, classes=groups.classes)
    data = table.read()
    if data.labels is None:
        raise UserError("no labels", where=path, remedy="add labels of the held-out samples")
    with np.load(path, allow_pickle=False) as stored:
        names = ("pseudo_seen", "train_logits", "train_labels", "floor", "source_logits", "classes")
        try:
            extra: dict[str, NDArray[Any]] = {name: stored[name] for name in names if name in stored.files}
        except ValueError as e:
            raise UserError("a pickled Python object in a fold", where=path, given=e, remedy="store arrays") from e
    own = [str(v) for v in extra["classes"].tolist()] if "classes" in extra else list(groups.classes)
    order = column_order(own, groups.classes, where=path)

    def scores(name: str) -> NDArray[Any] | None:
        if name not in extra:
            return None
        z = to_logits(extra[name], table.kind, classes=own, where=f"{path}, {name}")[0]
        return z if order is None else z[:, order]

    def names_of(values: NDArray[Any], what: str) -> list[str]:
        columns = label_columns(values, own, where=f"{path}, {what}").tolist()
        if -1 in columns:
            raise UserError("an unknown class", where=f"{path}, {what}", given="-1", remedy="leave such rows out")
        return [own[c] for c in columns]

    train_labels = names_of(extra["train_labels"], "train_labels") if "train_labels" in extra else None
    if "pseudo_seen" in extra:
        pseudo_seen = names_of(extra["pseudo_seen"], "pseudo_seen")
    elif train_labels is not None:
        pseudo_seen = list(dict.fromkeys(train_labels))
    else:
        raise UserError("which classes did the pseudo model see?", where=path, remedy="add pseudo_seen or train_labels")
    floor = float(np.asarray(extra["floor"]).reshape(-1)[0]) if "floor" in extra else None
    source = scores("source_logits")
    if floor is None and source is not None:
        floor = _source_accuracy(source, data.labels, groups, pseudo_seen, path)
    return Fold(
        data.logits, data.labels, pseudo_seen, scores("train_logits"), train_labels,
        groups.names(groups.absent), floor, path.name,
    )  # fmt: skip


def _source_accuracy(
    source: NDArray[Any], labels: NDArray[np.int64], groups: ClassGroups, pseudo_seen: list[str], path: Path
) -> float:
    """Accuracy of the source model on the pseudo-absent classes, among the columns of S."""
    from ft_calibrate.curve import seen_unseen_curve

    seen = groups.names(groups.seen)
    pseudo = class_groups(groups.classes, pseudo_seen, [n for n in seen if n not in pseudo_seen], where=path)
    return seen_unseen_curve(source, labels, pseudo, remaining="exclude").at(0.0).unseen

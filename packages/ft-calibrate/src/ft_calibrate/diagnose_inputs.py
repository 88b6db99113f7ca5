"""What a diagnosis is made of, checked and lined up: the same samples in the same order before and after.

Ours. A difference between two models is only worth its paired standard error if row i is the same sample in both
tables: rows are matched by ids where both files have them, and by equal labels otherwise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

from ft_calibrate.analyses_head import head_weights
from ft_calibrate.groups import ClassGroups, class_groups
from ft_calibrate.metrics import FEW, correct_per_sample
from ft_calibrate.table_checks import warn_duplicates
from ft_calibrate.tables import LogitTable, check_finite, file_sha256

Right = Mapping[str, NDArray[np.float64]]  # of `correct_per_sample`

log = logging.getLogger(__name__)


@dataclass
class Inputs:
    """Tables of one diagnosis, in the class order of `after`; `before` has the rows of `after`.

    Attributes
    ----------
    after, before : LogitTable
        Labelled test data, scored by the model after (and before) fine-tuning.
    reference, reference_before : LogitTable or None
        Target training data of all classes with features of either model; diagnosis only.
    train : LogitTable or None
        The fine-tuning data: labels in S only.
    head_before, head_after : ndarray (K, D) or None
        Head weights.
    groups, remaining
        The class groups, and what happens to the remaining columns.
    notes
        What a reader should know: small groups, rows left out, means that had to be taken from the test data.
    """

    after: LogitTable
    groups: ClassGroups
    before: LogitTable | None = None
    reference: LogitTable | None = None
    reference_before: LogitTable | None = None
    train: LogitTable | None = None
    head_before: NDArray[np.float64] | None = None
    head_after: NDArray[np.float64] | None = None
    remaining: str = "absent"
    notes: list[str] = field(default_factory=list)
    hashes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) columns of the test samples; every one is known."""
        assert self.after.labels is not None
        return self.after.labels

    def right(self, scores: Any) -> Right:
        """Whether each test sample is right by ``scores`` (N, K): (N,) 1, 0, or NaN outside the group, by key."""
        return correct_per_sample(scores, self.labels, self.groups, remaining=self.remaining)

    def shifted(self, gamma: float) -> NDArray[Any]:
        """The fine-tuned model's logits with ``gamma`` added to the absent ones."""
        logits = np.array(self.after.logits, dtype=np.result_type(self.after.logits.dtype, np.float32))
        logits[:, self.groups.moved(self.remaining)] += gamma
        return logits


def prepare(
    after: LogitTable,
    seen: Any,
    before: LogitTable | None = None,
    reference: LogitTable | None = None,
    train: LogitTable | None = None,
    *,
    reference_before: LogitTable | None = None,
    absent: Any = None,
    head_before: Any = None,
    head_after: Any = None,
    remaining: str = "absent",
) -> Inputs:
    """Check the tables against each other and bring them into one order. Arguments as in `ft_calibrate.diagnose`.

    Raises
    ------
    UserError
        No labels; samples that differ before and after; classes that differ; fine-tuning data with labels outside S;
        reference data without labels or features; scores that are not finite; the same file before and after.
    """
    if after.labels is None:
        raise UserError("a diagnosis needs labels", where=_where(after, "after"), remedy="give labelled test data")
    groups = class_groups(after.classes, seen, absent)
    groups.moved(remaining)  # an unknown word is told here
    inputs = Inputs(after, groups, remaining=remaining)
    _check(after, "after")
    if before is not None:
        if before is after or (after.path and before.path and describe(after)["sha256"] == describe(before)["sha256"]):
            remedy = "give the logits of the model before fine-tuning"
            raise UserError("the same data before and after fine-tuning", where=_where(before, "before"), remedy=remedy)
        before = before.reordered(after.classes)
        _check(before, "before")
        inputs.before = pair(after, before)
    known = np.asarray(after.labels) >= 0
    if not known.all():
        inputs.notes.append(f"{int((~known).sum())} test samples without a label are left out.")
        rows = np.flatnonzero(known)
        inputs.after = after.subset(rows)
        inputs.before = None if inputs.before is None else inputs.before.subset(rows)
    if len(inputs.after) == 0:
        raise UserError("no labelled sample", where=_where(after, "after"), remedy="give labelled test data")
    inputs.reference = _reference(reference, after.classes, "reference")
    inputs.reference_before = _reference(reference_before, after.classes, "reference-before")
    _check_dimensions(inputs)
    inputs.train = None if train is None else _train(train, groups)
    for name, head in (("head_before", head_before), ("head_after", head_after)):
        if head is not None:
            setattr(inputs, name, _head(head, after.classes, groups))
    inputs.notes += _group_notes(inputs)
    for name, table in (("train", inputs.train), ("reference", inputs.reference)):
        if table is not None and table.ids is not None and inputs.after.ids is not None:
            shared = warn_duplicates(table.ids, inputs.after.ids, (_where(table, name), _where(after, "test")))
            if shared:
                inputs.notes.append(f"{shared} samples are both in the {name} and the test data (leak).")
    given = {"after": after, "before": before, "reference": reference, "reference-before": reference_before}
    for name, table in (given | {"train": train}).items():
        if table is not None:
            inputs.hashes[name] = describe(table)
    return inputs


def pair(after: LogitTable, before: LogitTable) -> LogitTable:
    """``before`` with its rows in the order of ``after``: by ids where both have them, else labels must agree.

    Raises
    ------
    UserError
        Other samples, repeated ids, labels that differ, or nothing to compare by.
    """
    where = _where(before, "before")
    if after.ids is not None and before.ids is not None:
        place = {name: i for i, name in enumerate(before.ids)}
        for ids, table in ((before.ids, before), (after.ids, after)):
            if len(set(ids)) < len(ids):
                repeated = next(name for i, name in enumerate(sorted(ids)) if i and name == sorted(ids)[i - 1])
                raise UserError(
                    "ids repeat, so samples cannot be matched",
                    where=_where(table, "the test data"),
                    given=repeated,
                    remedy="give each sample its own id",
                )
        missing = [name for name in after.ids if name not in place]
        if missing:
            raise UserError(
                "the samples before and after fine-tuning are not the same",
                where=where,
                given=f"{len(missing)} of {len(after)} ids are missing, such as {missing[0]}",
                remedy="score the same images with both models",
            )
        if len(before) > len(after):
            log.warning("%d samples of %s are not in the other table and left out", len(before) - len(after), where)
        if before.ids != after.ids:
            before = before.subset(np.array([place[name] for name in after.ids], dtype=np.intp))
    elif len(before) != len(after):
        raise UserError(
            "the samples before and after fine-tuning are not the same",
            where=where,
            given=f"{len(before)} rows, {len(after)} after",
            remedy="score the same images with both models, or store ids in both files",
        )
    elif before.labels is None:
        raise UserError(
            "neither ids nor labels say that the rows are the same samples",
            where=where,
            remedy="store ids or labels in both files",
        )
    if before.labels is not None and after.labels is not None:
        both = (before.labels >= 0) & (after.labels >= 0)
        differ = np.flatnonzero(both & (before.labels != after.labels))
        if len(differ):
            row = int(differ[0])
            names = after.classes[int(before.labels[row])], after.classes[int(after.labels[row])]
            raise UserError(
                "labels before and after fine-tuning differ",
                where=where,
                given=f"{len(differ)} of {len(after)} rows, first row {row}: {names[0]} and {names[1]}",
                remedy="score the same images with both models, in one order, or store ids in both files",
            )
    return dataclasses.replace(before, labels=after.labels)


def describe(table: LogitTable) -> dict[str, Any]:
    """Where a table came from, its size and its SHA-256 (of the file, or of the arrays when there is none)."""
    entry: dict[str, Any] = {
        "samples": len(table),
        "classes": table.num_classes,
        "features": table.features is not None,
    }
    if table.path is not None and table.path.exists():
        return entry | {"path": str(table.path), "sha256": file_sha256(table.path)}
    digest = hashlib.sha256()
    for array in (table.logits, table.labels, table.features):
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return entry | {"path": None, "sha256": digest.hexdigest()}


def _where(table: LogitTable, name: str) -> str:
    return str(table.path) if table.path is not None else name


def _check(table: LogitTable, name: str) -> None:
    check_finite(table.logits, table.classes, table.ids, _where(table, name))
    if table.features is not None and not np.isfinite(np.asarray(table.features)).all():
        row = int(np.flatnonzero(~np.isfinite(np.asarray(table.features)).all(1))[0])
        raise UserError("features that are not finite", where=_where(table, name), given=f"row {row}")


def _reference(table: LogitTable | None, classes: list[str], name: str) -> LogitTable | None:
    if table is None:
        return None
    where = _where(table, name)
    if table.labels is None or table.features is None:
        lacking = "labels" if table.labels is None else "features"
        raise UserError(f"reference data need {lacking}", where=where, remedy="extract them with features and labels")
    table = table.reordered(classes)
    _check(table, name)
    assert table.labels is not None
    return table if (table.labels >= 0).all() else table.subset(np.flatnonzero(table.labels >= 0))


def _check_dimensions(inputs: Inputs) -> None:
    for name, table, reference in (
        ("reference", inputs.after, inputs.reference),
        ("reference-before", inputs.before, inputs.reference_before),
    ):
        if reference is None or table is None or table.features is None or reference.features is None:
            continue
        if reference.features.shape[1] != table.features.shape[1]:
            given = (
                f"{reference.features.shape[1]} features, {table.features.shape[1]} in {_where(table, 'the test data')}"
            )
            remedy = "extract both with the same model"
            raise UserError("features of different sizes", where=_where(reference, name), given=given, remedy=remedy)


def _train(train: LogitTable, groups: ClassGroups) -> LogitTable:
    where = _where(train, "train")
    if train.labels is None:
        raise UserError("gamma_ALG needs labels", where=where, remedy="give the labels of the fine-tuning data")
    train = train.reordered(groups.classes)
    _check(train, "train")
    assert train.labels is not None
    train = train if (train.labels >= 0).all() else train.subset(np.flatnonzero(train.labels >= 0))
    assert train.labels is not None
    outside = np.setdiff1d(train.labels, groups.seen)
    if len(outside):
        names = groups.names(outside)
        raise UserError(
            "fine-tuning data with labels that are not seen classes",
            where=where,
            given=", ".join(names[:5]) + (", ..." if len(names) > 5 else ""),
            remedy="give the data of the seen classes only; data of all classes go to --reference",
        )
    return train


def _head(head: Any, classes: list[str], groups: ClassGroups) -> NDArray[np.float64]:
    weight = head_weights(head)
    names = getattr(head, "class_names", None)
    if names is not None and list(map(str, names)) != classes and set(map(str, names)) == set(classes):
        place = {str(name): i for i, name in enumerate(names)}
        weight = weight[[place[name] for name in classes]]
    if len(weight) != groups.num_classes:
        given = f"{len(weight)} rows for {groups.num_classes} classes"
        raise UserError("head weights do not fit the classes", given=given, remedy="give the head of this classifier")
    return weight


def _group_notes(inputs: Inputs) -> list[str]:
    notes = []
    for name, columns, who in (("S", inputs.groups.seen, "seen"), ("U", inputs.groups.absent, "absent")):
        count = int(np.isin(inputs.labels, columns).sum())
        if count == 0:
            notes.append(f"No test sample of the {who} classes: their accuracies are not defined.")
        elif count < FEW:
            notes.append(f"Only {count} test samples of the {who} classes ({name}): read the intervals, not the means.")
    for note in notes:
        log.warning("%s", note)
    return notes

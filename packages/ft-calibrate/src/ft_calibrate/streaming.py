"""Calibrating files that do not fit in memory: fit, curve and (`ft_calibrate.applying`) apply over pieces of rows.

What a gamma needs of each row is kept, the scores are not (`ft_calibrate.condense`). What truly depends on all K scores
of a row (``bic``, ``temperature-per-group``, a temperature) reads the rows that choose it whole. This file is ours, not
from the papers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from vfm_core.errors import UserError, unknown_name
from vfm_core.files import jsonable

from ft_calibrate.applying import Applied, apply_file
from ft_calibrate.calibration import METHODS, Calibration, fit_calibration
from ft_calibrate.condense import condensed_gaps, condensed_margins, needed_labels
from ft_calibrate.curve import Curve, CurveAccumulator
from ft_calibrate.gap import GapAccumulator
from ft_calibrate.groups import ClassGroups, class_groups
from ft_calibrate.logit_table import LogitTable
from ft_calibrate.methods import warn_without_rows
from ft_calibrate.pcv import ratio_pcv
from ft_calibrate.tables import TableFile, file_sha256

__all__ = ["Applied", "apply_file", "curve_file", "fit_file", "groups_of_file"]

ON_MARGINS = ("oracle", "val", "rate")
WHOLE = ("bic", "temperature-per-group")


def groups_of_file(table: TableFile, seen: Any = None, absent: Any = None) -> ClassGroups:
    """Class groups of a file's columns.

    Parameters
    ----------
    seen
        As for `class_groups`; None: the classes that occur among the file's labels.
    absent
        As for `class_groups`.

    Raises
    ------
    UserError
        No labels to take the seen classes from, or the errors of `class_groups`.
    """
    if seen is None:
        labels = table.labels()
        if labels is None or not (labels >= 0).any():
            remedy = "name the classes with --seen a,b,c or --seen FILE"
            raise UserError("no labels to take the seen classes from", where=table.path, remedy=remedy)
        seen = np.unique(labels[labels >= 0])
    return class_groups(table.classes, seen, absent, where=table.path)


def fit_file(
    table: TableFile,
    groups: ClassGroups,
    method: str = "alg",
    *,
    remaining: str = "absent",
    allow_absent_labels: bool = False,
    temperature: bool = False,
    held_out: TableFile | None = None,
    rows: int | None = None,
    each: Callable[[LogitTable], None] | None = None,
    sources: Sequence[str] = (),
    **options: Any,
) -> Calibration:
    """`ft_calibrate.calibration.fit_calibration` on a file, in bounded memory.

    Parameters
    ----------
    table
        The data that choose the calibration: fine-tuning data for ``alg``, ``ratio-pcv`` and ``prior``, labelled or
        unlabelled target data for the others. Its scores are not read by methods that need none.
    groups, remaining, allow_absent_labels, temperature, options
        As for `fit_calibration`. ``bic``, ``temperature-per-group`` and a temperature read the table whole.
    held_out
        File for the temperature.
    rows
        Rows in memory at once; default about 16 MB of scores.
    each
        Called with every piece whose scores are read.
    sources
        Names of further data that choose the calibration (files of folds), for the record.

    Returns
    -------
    Calibration
        That of the in-memory call; ``input_sha256`` is that of the file, and ``chosen_on`` names it.

    Raises
    ------
    UserError
        As `fit_calibration` and `TableFile.chunks`.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS, where="--method")
    needs = METHODS[method].reads
    reads_table = bool(needs) and not (method == "temperature-per-group" and options.get("group_temperature"))
    if METHODS[method].seen_labels_only:
        _check_leak(table, groups, method, allow_absent_labels)
    common = {
        "remaining": remaining,
        "allow_absent_labels": allow_absent_labels,
        "input_kind": table.kind,
        "input_sha256": file_sha256(table.path) if reads_table else None,
        **options,
    }
    pieces = _Told(table, rows, each)
    if temperature or (reads_table and method in WHOLE):
        record = _whole(table, groups, method, temperature, held_out, each, common)
    elif reads_table and "logits" in needs and len(groups.moved(remaining)) == 0:
        piece = next(pieces())  # nothing is moved: gamma is 0 whatever the scores are
        record = fit_calibration(piece.logits, piece.labels, groups, method, **common)
    elif method == "alg":
        z, y, small = condensed_gaps(pieces(), groups, remaining)
        found = fit_calibration(z, y, small, method, **common | {"remaining": "absent"})
        record = _renamed(found, groups, remaining)
    elif method == "ratio-pcv":
        record = _ratio(pieces(), groups, remaining, common)
    elif method in ON_MARGINS:
        z, y, small = condensed_margins(pieces(), groups, remaining)
        if method != "rate" and (y < 0).all():
            raise UserError(f"method {method} needs labels", where=table.path, remedy=f"give {METHODS[method].needs}")
        labels = None if method == "rate" else y
        found = fit_calibration(z, labels, small, method, **common | {"remaining": "exclude"})
        record = _renamed(found, groups, remaining)
    else:
        record = fit_calibration(None, table.labels() if "labels" in needs else None, groups, method, **common)
    if table.looks_like_probabilities and method in ("alg", "ratio-pcv"):
        raise UserError(
            f"method {method} needs logits, and these scores look like probabilities (rows sum to 1)",
            where=table.path,
            remedy="say --input prob to take their log",
        )
    named = [table.path.name] * reads_table + list(sources)
    if table.dropped:
        named.append(f"{table.dropped} rows with NaN or inf dropped")
    return dataclasses.replace(
        record, chosen_on=f"{record.chosen_on} ({', '.join(named)})" if named else record.chosen_on
    )


class _Told:
    """The pieces of a table, each handed to ``each`` on the way."""

    def __init__(self, table: TableFile, rows: int | None, each: Callable[[LogitTable], None] | None) -> None:
        self.table, self.rows, self.each = table, rows, each

    def __call__(self) -> Iterator[LogitTable]:
        for piece in self.table.chunks(self.rows):
            if self.each is not None:
                self.each(piece)
            yield piece


def _whole(
    table: TableFile,
    groups: ClassGroups,
    method: str,
    temperature: bool,
    held_out: TableFile | None,
    each: Callable[[LogitTable], None] | None,
    common: dict[str, Any],
) -> Calibration:
    """Methods that need all scores of the rows that choose them."""
    if method != "fixed" and not METHODS[method].reads and held_out is None:
        remedy = "give held-out data of the seen classes with --held-out FILE"
        raise UserError(f"a temperature after method {method} needs data", where="--temperature", remedy=remedy)
    extra: dict[str, Any] = {}
    if temperature:
        extra["temperature"] = True
    if held_out is not None:
        judge = held_out.read()
        extra["held_out"] = (judge.logits, needed_labels(judge))
    data = table.read()
    if each is not None:
        each(data)
    return fit_calibration(data.logits, data.labels, groups, method, **extra, **common)


def _renamed(record: Calibration, groups: ClassGroups, remaining: str) -> Calibration:
    """The record of a condensed problem with the classes of the real one."""
    return dataclasses.replace(
        record,
        classes=groups.classes,
        seen=tuple(groups.names(groups.seen)),
        absent=tuple(groups.names(groups.absent)),
        remaining=tuple(groups.names(groups.remaining)),
        remaining_mode=remaining,
    )


def _ratio(pieces: Iterable[LogitTable], groups: ClassGroups, remaining: str, common: dict[str, Any]) -> Calibration:
    """ratio-PCV: the folds are small and whole, the gap of the real model comes from the pieces."""
    gaps = GapAccumulator(groups, remaining)
    for piece in pieces:
        gaps.add(piece.logits, needed_labels(piece), where=piece.path)
    record = fit_calibration(None, None, groups, "pcv", **common)  # also refuses when there are no folds
    estimate = ratio_pcv(
        common["folds"],
        gaps.gamma(),
        common.get("criterion") or "balanced",
        common.get("columns", "pseudo"),
        common.get("reduce", "mean"),
        groups.classes,
        groups.names(groups.seen),
    )
    found = estimate.to_dict()
    leaked = gaps.n_absent > 0
    asked = common.get("uses_test_labels")
    return dataclasses.replace(
        record,
        method="ratio-pcv",
        gamma=estimate.gamma,
        ci95=estimate.ci95,
        per_fold_gamma=estimate.per_fold,
        n_train=record.n_train + gaps.n,
        chosen_on=f"{len(estimate.per_fold)} pseudo models, {record.n_train} held-out rows of seen classes, and the "
        f"gap of {gaps.n} fine-tuning rows",
        uses_absent_labels=leaked,
        uses_test_labels=leaked if asked is None else asked,
        details=jsonable({name: found[name] for name in record.details}),
    )


def _check_leak(table: TableFile, groups: ClassGroups, method: str, allowed: bool) -> None:
    """Refuse labels of other than seen classes in data that must be fine-tuning data."""
    labels = None if allowed else table.labels()
    if labels is None:
        return
    outside, counts = np.unique(labels[(labels >= 0) & ~np.isin(labels, groups.seen)], return_counts=True)
    if len(outside):
        shown = [f"{name} ({n} rows)" for name, n in zip(groups.names(outside[:6]), counts[:6].tolist())]
        raise UserError(
            f"labels of classes that are not seen, in data for method {method} (leak)",
            where=table.path,
            given=", ".join(shown) + (f", ... ({len(outside)} classes)" if len(outside) > 6 else ""),
            remedy="leave those rows out, or allow them with --allow-absent-labels (parity with the published code)",
        )
    warn_without_rows(groups, np.unique(labels[labels >= 0]))


def curve_file(
    table: TableFile,
    groups: ClassGroups,
    remaining: str = "absent",
    rows: int | None = None,
    each: Callable[[LogitTable], None] | None = None,
) -> Curve:
    """`ft_calibrate.curve.seen_unseen_curve` of a labelled file, in bounded memory.

    Parameters
    ----------
    table, groups, remaining, rows
        As for `fit_file`.
    each
        Called with every piece on the way.
    """
    curve = CurveAccumulator(groups, remaining)
    for piece in table.chunks(rows):
        curve.add(piece.logits, needed_labels(piece))
        if each is not None:
            each(piece)
    return curve.curve()

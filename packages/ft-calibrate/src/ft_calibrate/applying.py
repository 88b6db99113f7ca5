"""Predictions of a calibrated file, read and written in pieces, with the accuracies before and after.

The calibration is FTC's (arXiv 2409.16223) or one of ours, see `ft_calibrate.record`; the columns of the file are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.metrics import Interval

from ft_calibrate.curve import margins
from ft_calibrate.decomposition import DecompositionAccumulator
from ft_calibrate.fold_marks import folded_in
from ft_calibrate.groups import ClassGroups
from ft_calibrate.prediction_files import prediction_writer
from ft_calibrate.record import Calibration
from ft_calibrate.table_checks import IdCollector
from ft_calibrate.tables import TableFile

__all__ = ["GROUP_WORDS", "Applied", "apply_file"]

log = logging.getLogger(__name__)

GROUP_WORDS = {"S": "seen", "U": "absent", "R": "remaining"}


@dataclass
class Applied:
    """What `apply_file` did.

    Parameters
    ----------
    rows, changed, to_absent : int
        Samples, predictions that the calibration changed, and those of them that became a moved class.
    predicted : dict
        Samples predicted per group, before and after.
    before, after : dict or None
        Accuracies by group (`ft_calibrate.metrics.accuracy_decomposition`) without and with the calibration; None for
        data without labels.
    intervals : dict or None
        95 % bootstrap intervals of ``after``.
    ids : IdCollector
        For comparison with other data.
    """

    rows: int = 0
    changed: int = 0
    to_absent: int = 0
    predicted: dict[str, dict[str, int]] = field(default_factory=dict)
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    intervals: dict[str, Interval] | None = None
    ids: IdCollector = field(default_factory=IdCollector)


def apply_file(
    table: TableFile,
    calibration: Calibration,
    out: str | Path,
    *,
    rows: int | None = None,
    average: str = "micro",
    topk: Sequence[int] = (1, 5),
) -> Applied:
    """Write the predictions of a calibrated file; the scores are never in memory whole.

    The written columns are not kept either, except for ``.npz``, which can only be written in one go.

    Columns: ``id`` (the row number where the file has none), ``prediction`` (class name), ``group`` of the prediction
    (seen, absent, remaining), ``confidence`` (softmax of the calibrated scores at the record's temperature, in [0, 1]),
    ``margin`` (calibrated score of the prediction minus that of the runner-up), ``seen_minus_absent`` (best calibrated
    score of the columns without gamma minus the best of those with it: how much further gamma would have to go, or to
    come back, to change the side), ``uncalibrated`` (the prediction without calibration), and with labels ``label`` and
    ``correct``.

    Parameters
    ----------
    table
        Opened with ``classes=calibration.classes``, so that columns are matched by name.
    calibration
        The record.
    out
        ``.parquet``, ``.feather``, ``.csv``, ``.tsv`` or ``.npz``.
    rows
        Rows in memory at once.
    average, topk
        Of the accuracies.

    Returns
    -------
    Applied

    Raises
    ------
    UserError
        Columns in another order than the record's, an unknown average, or the errors of `TableFile.chunks`. No file is
        left behind.
    """
    if average not in ("micro", "macro"):
        raise UserError("unknown average", where="--average", given=average, remedy="use micro or macro")
    if list(table.classes) != list(calibration.classes):
        raise UserError("columns are not those of the calibration", where=table.path, remedy="open it with its classes")
    if held := folded_in(table.path):
        log.warning("%s: its model holds a calibration already (%s), and gets another one now", table.path, held)
    groups, mode = calibration.groups, calibration.remaining_mode
    names = np.array(groups.classes, dtype=object)
    words = np.array([GROUP_WORDS[g] for g in groups.group_of], dtype=object)
    accuracy = [DecompositionAccumulator(groups, mode, topk) for _ in range(2)]
    found = Applied()
    tally = np.zeros((2, groups.num_classes), dtype=np.int64)
    moved = np.isin(np.arange(groups.num_classes), groups.moved(mode))
    labelled = False
    with prediction_writer(Path(out), _metadata(table, calibration)) as write:
        for piece in table.chunks(rows):
            z = calibration.apply(piece.logits, kind="logit")
            raw = _competing(piece.logits, groups, mode)
            best, plain = z.argmax(axis=1), raw.argmax(axis=1)
            columns: dict[str, Any] = {
                "id": piece.ids if piece.ids is not None else [str(found.rows + i) for i in range(len(piece))],
                "prediction": names[best].tolist(),
                "group": words[best].tolist(),
                "confidence": _confidence(z, calibration.temperature),
                "margin": _margin(z),
                "seen_minus_absent": margins(z, groups, mode).astype(np.float32),
                "uncalibrated": names[plain].tolist(),
            }
            if piece.labels is not None and (piece.labels >= 0).any():
                labelled = True
                for accumulator, scores in zip(accuracy, (raw, z)):
                    accumulator.add(scores, piece.labels)
            if piece.labels is not None:
                known = piece.labels >= 0
                columns["label"] = [names[y] if y >= 0 else None for y in piece.labels.tolist()]
                columns["correct"] = [
                    bool(c) if k else None for c, k in zip((best == piece.labels).tolist(), known.tolist())
                ]
            write(columns)
            found.ids.add(piece.ids)
            found.rows += len(piece)
            found.changed += int((best != plain).sum())
            found.to_absent += int(((best != plain) & moved[best]).sum())
            for i, predicted in enumerate((plain, best)):
                tally[i] += np.bincount(predicted, minlength=groups.num_classes)
    for when, counts in zip(("before", "after"), tally):
        found.predicted[when] = {w: int(counts[groups.group_of == g].sum()) for g, w in GROUP_WORDS.items()}
    if labelled:
        found.before, found.after = (accumulator.result(average) for accumulator in accuracy)
        found.intervals = accuracy[1].intervals()
        accuracy[1].warn()
    return found


def _competing(logits: NDArray[Any], groups: ClassGroups, mode: str) -> NDArray[Any]:
    """Scores without calibration: only the excluded columns are masked."""
    excluded = groups.excluded(mode)
    if not len(excluded):
        return logits
    out = np.array(logits)
    out[:, excluded] = -np.inf
    return out


def _confidence(z: NDArray[Any], temperature: float) -> NDArray[np.float32]:
    scaled = z.astype(np.float64) / temperature
    top = scaled.max(axis=1)
    return (1 / np.exp(scaled - top[:, None]).sum(axis=1)).astype(np.float32)


def _margin(z: NDArray[Any]) -> NDArray[np.float32]:
    if z.shape[1] < 2:
        return np.full(len(z), np.inf, dtype=np.float32)
    two = np.partition(z, z.shape[1] - 2, axis=1)[:, -2:].astype(np.float64)
    return (two[:, 1] - two[:, 0]).astype(np.float32)


def _metadata(table: TableFile, calibration: Calibration) -> dict[str, Any]:
    chosen = calibration.to_dict()
    keep = (
        "method", "gamma", "criterion", "chosen_on", "temperature", "ci95", "n_train", "uses_absent_labels",
        "uses_test_labels", "oracle", "remaining_mode", "seen", "absent", "remaining", "created_with", "input_sha256",
        "notes",
    )  # fmt: skip
    return {name: chosen[name] for name in keep} | {"applied_to": table.path.name}

"""ALG, the average logit gap: gamma from the logits of the fine-tuning data alone.

FTC (arXiv 2409.16223), calibration by the average logit gap::

    gamma_ALG = mean_i( mean_{c in S, c != y_i} z_c(x_i) ) - mean_i( mean_{c in U} z_c(x_i) )

over the fine-tuning training set, whose labels all lie in S. The ground-truth logit is left out of the seen mean: the
gap is between logits that are all wrong answers. Row constants cancel, so log-probabilities give the same gamma as
logits.

The paper uses training data of S. The published code evaluates the same expression on whatever split is being tested,
with test labels, absent classes included (no seen class is dropped in those rows). Handed such data, these functions
return that value too; `ft_calibrate.calibration.fit_calibration` then marks the record ``uses_test_labels``.

Two mistakes are seen in public re-implementations. The first keeps the ground-truth logit in the seen mean, which makes
gamma too large by the mean margin over |S|. The second is described in `ft_calibrate.pcv`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

from ft_calibrate.groups import ClassGroups, class_groups, label_columns
from ft_calibrate.inputs import as_scores
from ft_calibrate.metrics import score_chunks, take_columns

__all__ = ["GapAccumulator", "GapUndefined", "average_logit_gap"]

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]


class GapUndefined(UserError):
    """Fewer than two seen classes: no wrong seen logit is left once the ground truth is taken out."""


class GapAccumulator:
    """The average logit gap over data that arrive in pieces; keeps one number per row.

    Parameters
    ----------
    groups : ClassGroups
        The classes of the head. With no moved column the gap is 0.
    remaining : {"absent", "keep", "exclude"}
        Remaining classes count in the absent mean only with ``"absent"``.

    Attributes
    ----------
    n : int
        Rows that count.
    n_unlabelled : int
        Rows left out because their label is unknown (-1).
    n_absent : int
        Rows whose label is no seen class: not fine-tuning data, see the module's text.

    Raises
    ------
    GapUndefined
        If fewer than two seen columns are given.
    """

    def __init__(self, groups: ClassGroups, remaining: str = "absent") -> None:
        self.groups = groups
        self._moved = groups.moved(remaining)
        self._seen = groups.seen
        self._masked: NDArray[np.bool_] | None = None
        self._gaps: list[Floats] = []
        self.n = self.n_unlabelled = self.n_absent = 0
        if len(self._moved):
            _check_two(groups, len(self._seen))

    def add(self, logits: Any, labels: Any, *, where: str | Path | None = None, checked: bool = False) -> None:
        """Take the gaps of some rows.

        Parameters
        ----------
        logits
            (n, K) logits or log-probabilities.
        labels
            (n,) class names or columns; -1 or None: unknown, the row is left out.
        where
            The file or field, for messages.
        checked
            ``logits`` come from `ft_calibrate.inputs.as_scores` and are not looked through once more.

        Raises
        ------
        UserError
            Values that are not finite, labels that are no class, lengths that disagree, columns that are masked
            (-inf) in one piece and not in another, or all moved columns masked.
        """
        names = self.groups.classes
        z = logits if checked else as_scores(logits, len(names), classes=names, where=where)
        y = label_columns(labels, names, rows=len(z), where=where)
        if len(z) == 0:
            return
        self._check_masked(np.isneginf(z[0]), where)  # as_scores: a -inf means the whole column
        for part, block in score_chunks(z):
            known = y[part] >= 0
            label = y[part][known]
            self.n_unlabelled += len(known) - len(label)
            self.n += len(label)
            self.n_absent += int((~np.isin(label, self.groups.seen)).sum())
            if len(self._moved) and len(label):
                self._gaps.append(self._row_gaps(block if known.all() else block[known], label))

    def _check_masked(self, masked: NDArray[np.bool_], where: str | Path | None) -> None:
        if self._masked is None:
            self._masked = masked
            some = len(self._moved) > 0
            self._seen, self._moved = self._seen[~masked[self._seen]], self._moved[~masked[self._moved]]
            if some and len(self._moved) == 0:
                raise UserError("all classes of a group are masked", where=where, remedy="leave one column unmasked")
            if some:
                _check_two(self.groups, len(self._seen))
        elif (self._masked != masked).any():
            names = self.groups.names(np.flatnonzero(self._masked != masked))
            remedy = "-inf is allowed only for a whole column (a masked class)"
            given = ", ".join(names[:5])
            raise UserError("columns are -inf in a part of the rows", where=where, given=given, remedy=remedy)

    def _row_gaps(self, z: NDArray[Any], y: NDArray[np.int64]) -> Floats:
        total = take_columns(z, self._seen).sum(axis=1, dtype=np.float64)
        count = np.full(len(y), len(self._seen), dtype=np.float64)
        rows = np.flatnonzero(np.isin(y, self._seen))  # a masked ground-truth column is not in the sum
        total[rows] -= z[rows, y[rows]]
        count[rows] -= 1
        return total / count - take_columns(z, self._moved).mean(axis=1, dtype=np.float64)

    @property
    def gaps(self) -> Floats:
        """The gap of every row that counts, (n,); empty when nothing is absent."""
        return np.concatenate(self._gaps) if self._gaps else np.empty(0)

    def gamma(self) -> float:
        """The average logit gap so far, in logit units.

        Raises
        ------
        UserError
            If no labelled row was added.
        """
        if self.n_unlabelled:
            log.warning("%d rows without a label are left out of the average logit gap", self.n_unlabelled)
        if self.n == 0:
            raise UserError("the average logit gap needs labelled rows", given="none", remedy="give training logits")
        gaps = self.gaps
        return float(gaps.mean()) if len(gaps) else 0.0


def _check_two(groups: ClassGroups, usable: int) -> None:
    if usable < 2:
        names = ", ".join(groups.names(groups.seen)[:3])
        raise GapUndefined(
            "the average logit gap is undefined with fewer than two seen classes",
            given=f"{usable} class ({names})",
            remedy="choose gamma with --method rate or --method fixed",
        )


def average_logit_gap(
    logits: Any,
    labels: Any,
    seen: Any,
    absent: Any = None,
    *,
    classes: Sequence[str] | None = None,
    remaining: str = "absent",
) -> float:
    """gamma_ALG: how much lower the absent logits are than the wrong seen ones, on average (FTC).

    Parameters
    ----------
    logits
        (N, K) logits or log-probabilities of the fine-tuning data.
    labels
        (N,) class names or columns. The paper's gamma uses labels in S only; see the module's text for others.
    seen, absent
        Names, columns or boolean masks; ``absent=None``: every class that is not seen.
    classes
        Names of the K columns; by default ``"0"`` .. ``"K-1"``.
    remaining : {"absent", "keep", "exclude"}
        Whether classes in neither group count as absent.

    Returns
    -------
    float
        In logit units; 0 when nothing is absent. Usually positive after fine-tuning.

    Raises
    ------
    GapUndefined
        One seen class only.
    UserError
        No labelled row, all moved columns masked, or bad input.

    Examples
    --------
    >>> average_logit_gap([[5.0, 2.0, -1.0], [1.0, 6.0, -2.0]], [0, 1], seen=[0, 1])
    3.0
    """
    z = as_scores(logits, None if classes is None else len(classes), classes=classes)
    accumulator = GapAccumulator(class_groups(z.shape[1] if classes is None else classes, seen, absent), remaining)
    accumulator.add(z, labels, checked=True)
    return accumulator.gamma()

"""Accuracy by group over data that arrive in pieces: counts per class are kept, never the scores.

FTC (arXiv 2409.16223), the table Acc_{A/B}; see `ft_calibrate.metrics` for scores that fit in memory, with which the
numbers here agree exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.metrics import Interval

from ft_calibrate.groups import ClassGroups
from ft_calibrate.metrics import FEW, Tallies, averages, correct_per_sample, tallies, tally_intervals

__all__ = ["DecompositionAccumulator"]

log = logging.getLogger(__name__)

GROUPS = {"S": "seen", "U": "absent", "R": "remaining"}


class DecompositionAccumulator:
    """`ft_calibrate.metrics.accuracy_decomposition` of samples that arrive in blocks.

    Parameters
    ----------
    groups : ClassGroups
        The columns.
    remaining : {"absent", "keep", "exclude"}
        Whether the columns R compete.
    topk : sequence of int
        Right means: among the k best.

    Attributes
    ----------
    unlabelled : int
        Rows left out because their label is unknown.
    """

    def __init__(self, groups: ClassGroups, remaining: str = "absent", topk: Sequence[int] = (1, 5)) -> None:
        self.groups, self._remaining, self._topk = groups, remaining, topk
        self._tallies: Tallies = {}
        self._rows = np.zeros(groups.num_classes, dtype=np.int64)
        self.unlabelled = 0

    def add(self, logits: Any, labels: NDArray[np.int64]) -> None:
        """Add (n, K) scores with their columns (n,), -1 where unknown."""
        known = labels >= 0
        self.unlabelled += int((~known).sum())
        if not known.all():
            logits, labels = logits[known], labels[known]
        k = self.groups.num_classes
        self._rows += np.bincount(labels, minlength=k)
        right = correct_per_sample(logits, labels, self.groups, topk=self._topk, remaining=self._remaining)
        for key, (more, samples) in tallies(right, labels, k).items():
            before = self._tallies.get(key)
            self._tallies[key] = (more, samples) if before is None else (before[0] + more, before[1] + samples)

    @property
    def counts(self) -> dict[str, int]:
        """Labelled samples of ``"S"``, ``"U"`` and ``"R"``."""
        return {name: int(self._rows[self.groups.group_of == name].sum()) for name in GROUPS}

    def result(self, average: str = "micro") -> dict[str, float]:
        """The dictionary of `ft_calibrate.metrics.accuracy_decomposition`.

        Raises
        ------
        UserError
            No labelled sample, or an unknown average.
        """
        if not self._rows.any():
            raise UserError("no labelled sample", remedy="accuracies need labels")
        return averages(self._tallies, average) | {f"n_{name}": float(n) for name, n in self.counts.items()}

    def intervals(self, n: int = 2000, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
        """Percentile bootstrap intervals of the micro accuracies, as `ft_calibrate.metrics.group_intervals` makes them.

        Parameters
        ----------
        n, level, seed
            Resamples, coverage in (0, 1), and the seed of the resampling.
        """
        return tally_intervals(self._tallies, n, level, seed)

    def warn(self) -> None:
        """Log what limits these numbers: rows without a label, empty groups, groups below 30 samples."""
        if self.unlabelled:
            log.warning("%d samples have no label and are left out of the accuracies", self.unlabelled)
        for name, count in self.counts.items():
            if name == "R" and not len(self.groups.remaining):
                continue
            if count == 0:
                log.warning("no sample of the %s classes: %s/Y and %s/%s are nan", GROUPS[name], name, name, name)
            elif count < FEW:
                log.warning("only %d samples of the %s classes: read their intervals", count, GROUPS[name])

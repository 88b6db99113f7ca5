"""Mergers: what becomes of dropped tokens (MEDA Eq. 11-12, LOOK-M; ``weighted-by-score`` is ours)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from meda_kv.core.merging import HOW, gate_mask, merge, merge_by_score
from meda_kv.methods.base import Merger
from meda_kv.methods.checks import check_count, check_flag, check_name


@dataclass(frozen=True)
class KeyMerger(Merger):
    """Merge every dropped token into the kept one with the most similar key.

    Attributes
    ----------
    how : {"average", "pivot", "weighted"}
        MEDA's average, or LOOK-M's pivot and weighted merges.
    gate : "none", "mean" or float
        Which dropped tokens are merged; see :func:`meda_kv.core.merge`.
    merge_keys : bool
        False merges values only.
    block : int
        Most dropped tokens compared at a time.
    """

    how: str = "average"
    gate: str | float = "none"
    merge_keys: bool = True
    block: int = 4096

    def __post_init__(self) -> None:
        check_name("merge", self.how, HOW[1:], "unknown way to merge")
        check_flag("merge_keys", self.merge_keys)
        check_count("merge_block", self.block, 1)
        nothing = torch.zeros(1, 1, 0)
        gate_mask(nothing, nothing.bool(), self.gate)

    def merge(
        self, key: Tensor, value: Tensor, keep: Tensor, valid: Tensor | None, scores: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the kept slots after merging."""
        return merge(key, value, keep, self.how, self.gate, self.merge_keys, self.block, valid)


@dataclass(frozen=True)
class ScoreMerger(Merger):
    """Average values with their scores as weights, keys untouched (ours; see :func:`meda_kv.core.merge_by_score`).

    Attributes
    ----------
    block : int
        Most dropped tokens compared at a time.
    """

    block: int = 4096
    wants_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("merge_block", self.block, 1)

    def merge(
        self, key: Tensor, value: Tensor, keep: Tensor, valid: Tensor | None, scores: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the kept slots after merging their values."""
        if scores is None:
            raise RuntimeError("merging by score needs the scores of the slots; pass scores=")
        return merge_by_score(key, value, keep, scores, self.block, valid)

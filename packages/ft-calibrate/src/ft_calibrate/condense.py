"""What a choice of gamma needs of each row, kept instead of its scores: files that do not fit in memory.

The average logit gap (FTC, arXiv 2409.16223) needs one number of a row, the curve and every gamma chosen on it two.
Here these are written as the scores of a tiny head with the same gaps, margins and right answers, so that
`ft_calibrate.calibration.fit_calibration` runs on them unchanged and finds what it finds on the whole scores. This
file is ours, not from the papers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

from ft_calibrate.curve import margins
from ft_calibrate.gap import GapAccumulator
from ft_calibrate.groups import ClassGroups, class_groups
from ft_calibrate.logit_table import LogitTable

__all__ = ["condensed_gaps", "condensed_margins", "needed_labels"]

Floats = NDArray[np.float64]


def needed_labels(piece: LogitTable) -> NDArray[np.int64]:
    """The labels of a table.

    Raises
    ------
    UserError
        It has none.
    """
    if piece.labels is None:
        remedy = "give a file with labels, or a method that needs none"
        raise UserError("no labels", where=piece.path, remedy=remedy)
    return piece.labels


def condensed_gaps(
    pieces: Iterable[LogitTable], groups: ClassGroups, remaining: str = "absent"
) -> tuple[Floats, NDArray[np.int64], ClassGroups]:
    """The average-logit-gap problem of some data as a head of four columns: two seen, two absent.

    Parameters
    ----------
    pieces
        Fine-tuning data with labels.
    groups, remaining
        The classes of the file.

    Returns
    -------
    logits, labels, groups
        (n, 4), (n,), and the groups of the four columns. Row i is ``[g_i, g_i, -1, 1]`` with g_i the gap of the i-th
        labelled row, so that every method that averages gaps finds the same value; the -1 says that these are no
        probabilities.

    Raises
    ------
    UserError
        No labels, no labelled row, or all classes of a group masked.
    """
    gaps = GapAccumulator(groups, remaining)
    outside: list[NDArray[np.bool_]] = []
    for piece in pieces:
        labels = needed_labels(piece)
        gaps.add(piece.logits, labels, where=piece.path)
        outside.append(~np.isin(labels[labels >= 0], groups.seen))
    gaps.gamma()  # tells of rows without labels, refuses when none is left
    g = gaps.gaps
    z = np.stack([g, g, np.full_like(g, -1), np.ones_like(g)], axis=1)
    return z, np.where(np.concatenate(outside), 2, 0).astype(np.int64), class_groups(["S1", "S2", "U1", "U2"], [0, 1])


def condensed_margins(
    pieces: Iterable[LogitTable], groups: ClassGroups, remaining: str = "absent"
) -> tuple[Floats, NDArray[np.int64], ClassGroups]:
    """The seen-against-absent problem of some data as a head of five columns.

    Parameters
    ----------
    pieces
        Labelled or unlabelled data.
    groups, remaining
        As in `condensed_gaps`.

    Returns
    -------
    logits, labels, groups
        (N, 5), (N,), and the groups of the columns: "S right", "S wrong", "U right", "U wrong", "R". The best fixed
        score is d_i and the best moved score 0; each stands in the "right" column when it is the label's. Labels are
        "S right", "U right" or "R", -1 where unknown. "R" never competes: use ``remaining="exclude"``.
    """
    fixed, moved = groups.fixed(remaining), groups.moved(remaining)
    parts: list[Floats] = []
    codes: list[NDArray[np.int64]] = []
    kind = np.select([groups.group_of == "S", groups.group_of == "U"], [0, 2], 4)
    for piece in pieces:
        z, n = piece.logits, len(piece)
        d = margins(z, groups, remaining)
        if not np.isfinite(d).all():
            raise UserError("all classes of a group are masked", where=piece.path, remedy="leave one column unmasked")
        y = piece.labels if piece.labels is not None else np.full(n, -1, dtype=np.int64)
        code = np.where(y < 0, -1, kind[np.maximum(y, 0)])
        out = np.repeat((np.minimum(d, 0) - 1)[:, None], 5, axis=1)  # below both groups' best
        right_fixed = (code == 0) & (fixed[np.asarray(z[:, fixed]).argmax(axis=1)] == y)
        right_moved = (code == 2) & (moved[np.asarray(z[:, moved]).argmax(axis=1)] == y)
        every = np.arange(n)
        out[every, np.where(right_fixed, 0, 1)] = d
        out[every, np.where(right_moved, 2, 3)] = 0.0
        parts.append(out)
        codes.append(code)
    names = ["S right", "S wrong", "U right", "U wrong", "R"]
    return np.concatenate(parts), np.concatenate(codes), class_groups(names, [0, 1], [2, 3])

"""The gammas one could choose on a seen-unseen curve, side by side, each with what chose it; and their picture.

FTC (arXiv 2409.16223): the curve, AUSUC, the average logit gap, and gamma*, the oracle. Every row says which data chose
gamma and whether labels of absent classes were used; the balanced and harmonic criteria and the layout are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ft_calibrate.curve import CRITERIA, Curve, FloorNotReached
from ft_calibrate.figure_style import COLOURS, INK, NAMES, figure, percent_axis, save_png, wilson_band
from ft_calibrate.record import Calibration

__all__ = ["UPPER_BOUND", "Choice", "choice_rows", "choices_on", "curve_picture", "from_calibration"]

UPPER_BOUND = "upper bound, not deployable"
MOST_POINTS = 4000  # of a curve in the picture


@dataclass(frozen=True)
class Choice:
    """One gamma and where it comes from.

    Parameters
    ----------
    name : str
        For people.
    gamma : float
        In logit units.
    chosen_on : str
        The data that chose it.
    absent_labels : bool
        Whether labels of absent classes were used.
    note : str
        Such as `UPPER_BOUND`.
    plateau : (float, float) or None
        All gammas in between are as good by the criterion on the same data.
    """

    name: str
    gamma: float
    chosen_on: str
    absent_labels: bool = False
    note: str = ""
    plateau: tuple[float, float] | None = None


def from_calibration(record: Calibration, name: str | None = None) -> Choice:
    """The choice of a calibration record."""
    notes = [UPPER_BOUND] if record.oracle else []
    if record.origin().startswith("as the published code"):
        notes.append(record.origin())
    if record.scale is not None or record.shift is not None:
        notes.append(f"gamma alone, of: {record.effect()}")
    return Choice(name or record.method, record.gamma, record.chosen_on, record.uses_absent_labels, "; ".join(notes))


def choices_on(curve: Curve, data: str, floor: float | None = None) -> list[Choice]:
    """No calibration, and the best gamma of every criterion that the curve's samples allow (oracles all).

    Parameters
    ----------
    curve
        Of labelled data.
    data
        Name of those data.
    floor
        Accuracy of the source model on the absent classes, for ``"source-floor"``.
    """
    found = [Choice("none", 0.0, "no data")]
    if curve.n_seen == 0 or curve.n_unseen == 0:
        return found
    for criterion in CRITERIA:
        if criterion == "source-floor" and floor is None:
            continue
        try:
            best = curve.best(criterion, floor=floor if criterion == "source-floor" else None)
        except FloorNotReached:
            continue
        name = "oracle" if criterion == "overall" else f"oracle ({criterion})"
        found.append(Choice(name, best.gamma, f"labels of {data}", True, UPPER_BOUND, (best.low, best.high)))
    return found


def choice_rows(curve: Curve, choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """A table: every choice with the accuracies that its gamma has on the curve.

    The fields "S/Y 95 %", "U/Y 95 %" and "Y/Y 95 %" are Wilson intervals (low, high); None without samples.
    """
    rows = []
    for choice in choices:
        point = curve.at(choice.gamma)
        rows.append(
            {
                "gamma by": choice.name,
                "gamma": choice.gamma,
                "S/Y": point.seen,
                "U/Y": point.unseen,
                "Y/Y": point.overall,
                "H": point.harmonic,
                "S/Y 95 %": _interval(point.seen, curve.n_seen),
                "U/Y 95 %": _interval(point.unseen, curve.n_unseen),
                "Y/Y 95 %": _interval(point.overall, curve.n_seen + curve.n_unseen),
                "plateau": "" if choice.plateau is None else "{:.4g} to {:.4g}".format(*choice.plateau),
                "chosen on": choice.chosen_on,
                "absent labels": "used" if choice.absent_labels else "no",
                "note": choice.note,
            }
        )
    return rows


def _interval(share: float, n: int) -> tuple[float, float] | None:
    if n == 0:
        return None
    low, high = wilson_band([share], n)
    return float(low[0]), float(high[0])


def curve_picture(curve: Curve, choices: Sequence[Choice], path: str | Path, title: str = "") -> Path | None:
    """Draw the curve and the accuracies over gamma with every choice marked; None when a group has no sample."""
    if curve.n_seen == 0 or curve.n_unseen == 0:
        return None
    shown = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), MOST_POINTS)).astype(int))
    marks = "osD^vP*X<>"
    with figure(10, 4.8) as fig:
        left, right = fig.subplots(1, 2, width_ratios=(1, 1.15))
        left.plot(curve.seen[shown], curve.unseen[shown], color=INK, label=f"AUSUC {curve.ausuc:.3f}")
        for i, choice in enumerate(choices):
            point = curve.at(choice.gamma)
            filled = not choice.absent_labels  # hollow: chosen with labels of absent classes
            left.plot(point.seen, point.unseen, marks[i % len(marks)], color=f"C{i}", ms=8, ls="none",
                      mfc=f"C{i}" if filled else "none", label=f"{choice.name}: gamma {choice.gamma:.3g}")  # fmt: skip
            right.axvline(choice.gamma, color=f"C{i}", lw=1, ls="-" if filled else ":")
        left.set(xlabel="accuracy on seen classes, S/Y", ylabel="accuracy on absent classes, U/Y",
                 xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title="Seen-unseen curve")  # fmt: skip
        left.set_aspect("equal")
        left.legend(loc="best", fontsize=8)
        gammas = [choice.gamma for choice in choices] + np.quantile(curve.gamma, [0.01, 0.99]).tolist()
        margin = 0.05 * (max(gammas) - min(gammas)) or 1.0
        low, high = min(gammas) - margin, max(gammas) + margin
        inside = shown[(curve.gamma[shown] >= low) & (curve.gamma[shown] <= high)]
        for group, values, n in (("S", curve.seen, curve.n_seen), ("U", curve.unseen, curve.n_unseen)):
            right.plot(curve.gamma[inside], values[inside], color=COLOURS[group], label=f"{NAMES[group]}, n = {n}")
            right.fill_between(curve.gamma[inside], *wilson_band(values[inside], n), color=COLOURS[group], alpha=0.15,
                               lw=0)  # fmt: skip
        right.plot(curve.gamma[inside], curve.overall[inside], color=INK, lw=1.3, ls=":", label="all samples")
        right.set(xlabel="gamma (added to the absent logits)", ylabel="accuracy among all classes", xlim=(low, high),
                  ylim=(-0.03, 1.03), title=f"Accuracy over gamma{title and f', {title}'}")  # fmt: skip
        for axis in (left.xaxis, left.yaxis, right.yaxis):
            percent_axis(axis)
        right.legend(loc="best", fontsize=8)
        return save_png(fig, path)

"""The table of a comparison: cells put together over seeds, with intervals of the difference to plain fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.metrics import bootstrap_interval

from ft_calibrate.compare_units import is_upper_bound

if TYPE_CHECKING:
    from ft_calibrate.comparison import Cell

__all__ = ["BASELINE", "MEASURES", "display", "table"]

MEASURES = ("Y/Y", "S/Y", "U/Y", "S/S", "U/U", "R/Y", "H", "AUSUC", "NCM U/U", "NCM U/Y", "ECE", "gamma")
BASELINE = ("ft", "none")
"""Recipe and calibration that differences are taken to: what the user has without any remedy."""

Floats = NDArray[np.float64]


def table(
    cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]], folder: Path, n_bootstrap: int = 1000
) -> list[dict[str, Any]]:
    """One row per setting, recipe and calibration.

    Parameters
    ----------
    cells : sequence of Cell
        In the order of the table.
    records : mapping
        Finished cells by key; a cell without one is left out.
    folder : Path
        Where the cells' predictions lie.
    n_bootstrap : int
        Resamples over test samples.

    Returns
    -------
    list of dict
        The setting's axes, ``recipe``, ``calibration``, every number of `MEASURES` as the mean over seeds and under
        ``sd`` its standard deviation (None for one seed), ``gamma from``, ``effect`` (of the first seed, where it is
        more than a gamma), ``absent labels``, ``upper bound``, ``seeds`` (that are in the mean), ``seeds asked``
        (with those that failed), ``skipped folds`` (reasons), and ``Y/Y - ft``, ``S/Y - ft``, ``U/Y - ft``
        as (difference, low, high): paired bootstrap over test samples, 95%, of the mean over seeds; None where no
        sample is in both.
    """
    grouped: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        point = tuple(sorted((axis, str(value)) for axis, value in cell.setting.labels.items()))
        grouped.setdefault((point, cell.recipe, cell.calibration), []).append(cell)
    asked = {key: len(group) for key, group in grouped.items()}
    finished = {key: [cell for cell in group if cell.key in records] for key, group in grouped.items()}
    grouped = {key: group for key, group in finished.items() if group}
    right = {key: _right(group, folder) for key, group in grouped.items()}
    rows = []
    for key, group in grouped.items():
        found = [records[cell.key] for cell in group]
        row: dict[str, Any] = {**group[0].setting.labels, "recipe": key[1], "calibration": key[2]}
        spread: dict[str, float | None] = {}
        for name in MEASURES:
            values = np.asarray([np.nan if r.get(name) is None else r[name] for r in found], dtype=np.float64)
            if name in found[0]:
                known = not np.isnan(values).any()
                row[name] = float(values.mean()) if known else None
                spread[name] = float(values.std(ddof=1)) if known and len(values) > 1 else None
        upper = is_upper_bound(key[1])
        row["gamma from"] = found[0]["chosen_on"] + (" (test labels)" if found[0]["test_labels"] else "")
        if upper and key[2] != "none":
            row["gamma from"] += ", by a model trained on all classes"
        row["effect"] = found[0]["effect"] if found[0]["gamma"] is None else ""
        row["absent labels"] = bool(found[0]["absent_labels"] or upper)
        row["upper bound"] = bool(found[0]["oracle"] or upper)
        row["NCM reference"] = found[0].get("NCM reference")
        row["seeds"] = len(found)
        row["seeds asked"] = asked[key]
        row["skipped folds"] = [reason for record in found for reason in record.get("skipped", ())]
        row["sd"] = spread
        base = right.get((key[0], *BASELINE))
        if base is not None and (key[1], key[2]) != BASELINE:
            for name in base.shares:
                row[f"{name} - ft"] = _difference(right[key], base, name, n_bootstrap)
        rows.append(row)
    return rows


@dataclass(frozen=True)
class _Right:
    """Share of seeds that are right on each test sample that all of them could read.

    Attributes
    ----------
    rows : ndarray of int64, (N,)
        Positions in the test data, ascending.
    shares : dict of str to ndarray, (N,)
        ``Y/Y``, ``S/Y``, ``U/Y``; NaN outside the group.
    """

    rows: NDArray[np.int64]
    shares: dict[str, Floats]


def _right(group: Sequence[Cell], folder: Path) -> _Right:
    total: dict[str, list[Floats]] = {"Y/Y": [], "S/Y": [], "U/Y": []}
    stored = []
    for cell in group:
        with np.load(folder / f"{cell.key}.npz", allow_pickle=False) as arrays:
            stored.append({name: arrays[name] for name in ("rows", "predicted", "labels")})
    rows = reduce(np.intersect1d, [one["rows"] for one in stored])
    for cell, one in zip(group, stored, strict=True):
        at = np.isin(one["rows"], rows)
        predicted, labels = one["predicted"][at], one["labels"][at]
        number = {name: column for column, name in enumerate(cell.classes)}
        right = np.where(labels >= 0, (predicted == labels).astype(np.float64), np.nan)
        for key, names in (("S/Y", cell.setting.seen), ("U/Y", cell.setting.absent)):
            total[key].append(np.where(np.isin(labels, [number[name] for name in names]), right, np.nan))
        total["Y/Y"].append(right)
    return _Right(rows, {key: np.mean(values, axis=0) for key, values in total.items()})


def _difference(own: _Right, base: _Right, name: str, n: int) -> tuple[float, float, float] | None:
    both = np.intersect1d(own.rows, base.rows)  # pictures may have been readable for one and not for the other
    if len(both) == 0:
        return None
    a, b = (one.shares[name][np.isin(one.rows, both)] for one in (own, base))
    interval = bootstrap_interval(a - b, n)
    return (interval.mean, interval.low, interval.high)


def display(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as people want to read them: few columns, words for flags, spread beside the main numbers."""
    shown = []
    for row in rows:
        sd = row["sd"]
        line = {}
        for name, value in row.items():
            if name in ("sd", "upper bound", "NCM reference", "S/Y - ft", "effect", "seeds asked", "skipped folds"):
                continue
            line[name] = ("yes" if value else "no") if name == "absent labels" else value
            if name in ("Y/Y", "U/Y", "AUSUC", "gamma") and sd.get(name) is not None:
                line[f"{name} ±"] = sd[name]
        if row.get("seeds asked", row.get("seeds")) != row.get("seeds"):
            line["seeds"] = f"{row['seeds']} of {row['seeds asked']}"
        if row.get("skipped folds"):
            number = len(row["skipped folds"])
            line["gamma from"] = f"{line['gamma from']}; {number} fold{'s' if number > 1 else ''} skipped"
        if row.get("effect"):
            line["gamma from"] = f"{line['gamma from']}: {row['effect']}"
        if row["upper bound"]:
            line["gamma from"] = f"{line['gamma from']}; upper bound, not deployable".removeprefix("-; ")
        shown.append(line)
    return shown

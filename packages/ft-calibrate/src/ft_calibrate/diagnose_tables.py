"""The tables of a diagnosis: one function for each analysis, rows for people and for JSON.

Accuracies, curve and NCM read-out are those of FTC (arXiv 2409.16223), A1 to A8 its analyses; intervals are ours
(95 % bootstrap over the samples). A value with an interval is a triple ``(value, low, high)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ft_calibrate.analyses import (
    LOGIT_SCALE,
    accuracy_gain,
    ground_truth_margin_per_sample,
    group_decision,
    logit_scale_per_sample,
    mean_interval,
    paired_change,
    rows_of,
)
from ft_calibrate.analyses_features import DISTANCES, MOVEMENTS, feature_movement
from ft_calibrate.analyses_head import ClassRelationship, class_relationship
from ft_calibrate.curve import Curve
from ft_calibrate.diagnose_inputs import Inputs, Right
from ft_calibrate.feature_probes import Probe
from ft_calibrate.projection import group_separation
from ft_calibrate.tables import LogitTable

Floats = NDArray[np.float64]
Row = dict[str, Any]

GROUP_WORDS = {"S": "seen", "U": "absent", "R": "remaining"}


@dataclass(frozen=True)
class Gamma:
    """One gamma with its origin.

    Attributes
    ----------
    value
        In logit units.
    name
        As reports show it.
    uses_absent_labels, uses_test_labels
        What its choice looked at.
    remark
        Such as "upper bound, not deployable".
    low, high
        Ends of its plateau, for gamma* only.
    """

    value: float
    name: str
    uses_absent_labels: bool = False
    uses_test_labels: bool = False
    remark: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def deployable(self) -> bool:
        """Whether it can be known without labels of the test data."""
        return not self.uses_test_labels


@dataclass
class Settings:
    """Resampling of the intervals."""

    n_bootstrap: int = 1000
    seed: int = 0
    max_points: int = 600

    def mean(self, values: Any) -> tuple[float, float, float]:
        """Mean with its interval."""
        return mean_interval(values, self.n_bootstrap, self.seed)

    def change(self, after: Any, before: Any) -> tuple[float, float, float]:
        """Paired change with its interval."""
        return paired_change(after, before, self.n_bootstrap, self.seed).interval


def accuracy_rows(models: Mapping[str, tuple[Right, Gamma | None]], keys: list[str], settings: Settings) -> list[Row]:
    """Micro top-1 accuracies with intervals, one row per model and gamma; H is their harmonic mean."""
    from ft_calibrate.metrics import harmonic_mean

    rows = []
    for name, (right, gamma) in models.items():
        row: Row = {"model": name, "gamma": 0.0 if gamma is None else gamma.value, **_origin(gamma)}
        row |= {key: settings.mean(right[key]) for key in keys}
        row["H"] = float(harmonic_mean(row["S/Y"][0], row["U/Y"][0]))
        rows.append(row)
    return rows


def accuracy_all_rows(models: Mapping[str, tuple[Right, Gamma | None]], labels: Any, num_classes: int) -> list[Row]:
    """Every accuracy: micro and macro (class mean), top-1 and top-5."""
    rows = []
    for name, (right, gamma) in models.items():
        ks = sorted({int(key.partition("@")[2] or 1) for key in right})
        for average in ("micro", "macro"):
            for k in ks:
                suffix = "" if k == 1 else f"@{k}"
                keys = [key for key in right if key.partition("@")[2] == suffix[1:]]
                row: Row = {"model": name, "gamma": 0.0 if gamma is None else gamma.value, **_origin(gamma)}
                row |= {"average": average, "top-k": k}
                row |= {key.partition("@")[0]: _average(right[key], labels, num_classes, average) for key in keys}
                rows.append(row)
    return rows


def _origin(gamma: Gamma | None) -> Row:
    if gamma is None:
        return {"gamma from": "none", "absent labels used": False}
    return {"gamma from": gamma.name, "absent labels used": gamma.uses_absent_labels}


def _average(right: Floats, labels: Any, num_classes: int, average: str) -> float:
    kept = ~np.isnan(right)
    if not kept.any():
        return float("nan")
    if average == "micro":
        return float(right[kept].mean())
    y = np.asarray(labels)[kept]
    count = np.bincount(y, minlength=num_classes)
    total = np.bincount(y, weights=right[kept], minlength=num_classes)
    return float((total[count > 0] / count[count > 0]).mean())


def curve_rows(curves: Mapping[str, Curve]) -> list[Row]:
    """AUSUC and the ends of the seen-unseen curve."""
    return [
        {
            "model": name,
            "AUSUC": curve.ausuc,
            "S/Y at gamma = 0": curve.at(0.0).seen,
            "U/Y at gamma = 0": curve.at(0.0).unseen,
            "S/Y at gamma = -inf": float(curve.seen[0]),
            "U/Y at gamma = inf": float(curve.unseen[-1]),
            "points": len(curve),
        }
        for name, curve in curves.items()
    ]


def gamma_rows(gammas: Mapping[str, Gamma], curve: Curve) -> list[Row]:
    """Every gamma with the accuracies at it and what its choice looked at."""
    rows = []
    for gamma in (Gamma(0.0, "no calibration"), *gammas.values()):
        point = curve.at(gamma.value)
        rows.append(
            {
                "gamma from": gamma.name,
                "gamma": gamma.value,
                "plateau": "" if gamma.low is None else f"{gamma.low:.5g} .. {gamma.high:.5g}",
                "S+U/Y": point.overall,
                "S/Y": point.seen,
                "U/Y": point.unseen,
                "H": point.harmonic,
                "absent labels used": gamma.uses_absent_labels,
                "test labels used": gamma.uses_test_labels,
                "remark": gamma.remark,
            }
        )
    return rows


def ncm_rows(probes: list[Probe], settings: Settings) -> list[Row]:
    """Section "features": accuracies of feature classifiers before and after, and the paired change."""
    rows = []
    for probe in probes:
        keys = [key for key in ("Y/Y", "S/Y", "U/Y", "S/S", "U/U") if key in probe.after]
        head = {"classifier": probe.name, "means or neighbours from": probe.detail}
        if probe.before is not None:
            rows.append(head | {"model": "before"} | {key: settings.mean(probe.before[key]) for key in keys})
        rows.append(head | {"model": "after"} | {key: settings.mean(probe.after[key]) for key in keys})
        if probe.before is not None:
            changes = {key: settings.change(probe.after[key], probe.before[key]) for key in keys}
            rows.append(head | {"model": "change"} | changes)
    return rows


def gain_rows(nn: tuple[Right, Right], ncm: Probe | None, settings: Settings) -> list[Row]:
    """A1."""
    pair = None if ncm is None or ncm.before is None else (ncm.before, ncm.after)
    return accuracy_gain(
        (dict(nn[0]), dict(nn[1])),
        None if pair is None else (dict(pair[0]), dict(pair[1])),
        settings.n_bootstrap,
        settings.seed,
    )


def absent_rows(
    inputs: Inputs, right: Mapping[str, Right], margin: Mapping[str, Floats], gammas: Mapping[str, Gamma],
    settings: Settings,
) -> list[Row]:  # fmt: skip
    """A2: accuracy among the absent classes, and telling absent samples from seen ones at several gammas."""
    rows = []
    for name, d in margin.items():
        chosen = [("0", 0.0)]
        if name == "after":
            chosen += [(gamma.name, gamma.value) for gamma in gammas.values()]
        for label, value in chosen:
            row: Row = {"model": name, "gamma from": "none" if label == "0" else label, "gamma": value}
            row["U/U"] = settings.mean(right[name]["U/U"])
            row |= {f"S or U: {k}": v for k, v in group_decision(d, inputs.labels, inputs.groups, value).items()}
            rows.append(row)
    return rows


def logit_scale_rows(inputs: Inputs, settings: Settings) -> list[Row]:
    """A3 over test samples (all, S, U) and, where given, the fine-tuning samples."""
    rows = []
    tables: list[tuple[str, str, LogitTable | None]] = [
        ("test", "before", inputs.before),
        ("test", "after", inputs.after),
        ("train", "after", inputs.train),
    ]
    for split, model, table in tables:
        if table is None or table.labels is None or len(table) == 0:
            continue
        values = logit_scale_per_sample(table.logits, table.labels, inputs.groups, inputs.remaining)
        masks = rows_of(table.labels, inputs.groups)
        for group in ("all", "S", "U") if split == "test" else ("S",):
            row: Row = {"split": split, "model": model, "samples": group}
            row |= {name: settings.mean(values[name][masks[group]]) for name in LOGIT_SCALE}
            rows.append(row)
    return rows


def margin_rows(inputs: Inputs, settings: Settings) -> list[Row]:
    """A5 before and after."""
    rows = []
    for model, table in (("before", inputs.before), ("after", inputs.after)):
        if table is None:
            continue
        true, other = ground_truth_margin_per_sample(table.logits, inputs.labels, inputs.groups, inputs.remaining)
        rows.append(
            {
                "model": model,
                "true class": settings.mean(true),
                "largest other absent": settings.mean(other),
                "margin": settings.mean(true - other),
            }
        )
    return rows


def relationship_rows(inputs: Inputs) -> tuple[list[Row], ClassRelationship | None]:
    """A4; needs both heads."""
    if inputs.head_before is None or inputs.head_after is None:
        return [], None
    relationship = class_relationship(inputs.head_before, inputs.head_after, inputs.groups)
    rows = [
        {"pairs": "within absent (U)", "mean cosine of changes": relationship.within_U},
        {"pairs": "within seen (S)", "mean cosine of changes": relationship.within_S},
        {"pairs": "seen with absent (S x U)", "mean cosine of changes": relationship.between},
    ]
    return rows, relationship


def norm_rows(inputs: Inputs, settings: Settings) -> list[Row]:
    """A6: mean norm of the head rows, with an interval over classes."""
    rows = []
    for group, columns in (("S", inputs.groups.seen), ("U", inputs.groups.absent)):
        if not len(columns):
            continue
        row: Row = {"group": group, "classes": len(columns)}
        norms = {}
        for model, weight in (("before", inputs.head_before), ("after", inputs.head_after)):
            if weight is not None:
                norms[model] = np.linalg.norm(weight[columns], axis=1)
                row[model] = settings.mean(norms[model])
        if not norms:
            return []
        if len(norms) == 2:
            row["change"] = settings.change(norms["after"], norms["before"])
        rows.append(row)
    return rows


def movement_rows(inputs: Inputs) -> tuple[list[Row], list[Row]]:
    """A7: the 16 distances before and after, and the 3 x 2 movements of class means between the two."""
    pairs = []
    for model, table, reference in (
        ("before", inputs.before, inputs.reference_before),
        ("after", inputs.after, inputs.reference),
    ):
        if table is not None and table.features is not None:
            train = None if reference is None else (reference.features, reference.labels)
            pairs.append((model, (train, (table.features, inputs.labels))))
    if not pairs:
        return [], []
    same_space = len({np.shape(pair[1][0])[1] for _, pair in pairs}) == 1
    distances, movements = feature_movement([pair for _, pair in pairs], inputs.groups)
    rows = []
    for key in DISTANCES:
        split, group, target = key.split("/")
        row: Row = {"split": split, "samples": group, "to": target.replace("_", " ") + " mean"}
        row |= {model: values[key] for (model, _), values in zip(pairs, distances)}
        if len(pairs) == 2:
            row["change"] = distances[1][key] - distances[0][key]
        if any(row.get(model) == row.get(model) for model, _ in pairs):  # some value that is not NaN
            rows.append(row)
    moved = []
    if movements and same_space:
        for key in MOVEMENTS:
            split, group = key.split("/")
            if movements[0][key] == movements[0][key]:
                moved.append({"split": split, "classes": group, "movement of class means": movements[0][key]})
    return rows, moved


def separation_rows(inputs: Inputs, settings: Settings) -> list[Row]:
    """A8 in numbers."""
    rows = []
    for model, table in (("before", inputs.before), ("after", inputs.after)):
        if table is not None and table.features is not None:
            rows.append({"model": model} | group_separation(table.features, inputs.labels, inputs.groups,
                                                           settings.max_points, settings.seed))  # fmt: skip
    return rows

"""The grid of a comparison: its cells, those that earlier calls on the same folder asked for, and their order.

A run folder remembers what every call asked for (recipes, calibrations, seeds, values of a sweep). Cells of earlier
calls stay in the table; only those of the present call are computed. This part is ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vfm_core.errors import UserError
from vfm_core.files import write_json

from ft_calibrate.compare_cells import NEEDS_FOLDS, check_calibration
from ft_calibrate.compare_sweep import Setting
from ft_calibrate.compare_units import SOURCE, UPPER_BOUND, Context, Unit, is_upper_bound, make_unit, training_recipe
from ft_calibrate.pcv_folds import plan_folds
from ft_calibrate.target_data import fingerprint_of

__all__ = ["REQUESTS", "Cell", "add_request", "grid_cells", "in_order"]

REQUESTS = "requests.json"  # in the run folder: what every call asked for, oldest first


@dataclass(frozen=True, eq=False)
class Cell:
    """One recipe with one calibration, seed and setting, and the units that it is computed from."""

    key: str
    recipe: str
    calibration: str
    seed: int
    setting: Setting
    unit: Unit
    folds: tuple[Unit, ...] = ()
    classes: tuple[str, ...] = ()


def grid_cells(
    context: Context,
    settings: Sequence[Setting],
    recipes: Sequence[str],
    calibrations: Sequence[str],
    seeds: Sequence[int],
    facts: Mapping[str, Any],
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """The grid, and what was asked for and cannot be in it, with the reasons."""
    cells: list[Cell] = []
    refused: list[dict[str, Any]] = []
    classes = context.train.classes
    for setting in settings:
        number = {name: column for column, name in enumerate(classes)}
        seen_rows = context.train.of(number[name] for name in setting.seen)
        if len(seen_rows) == 0:
            raise UserError("no row of a seen class", where="training data", given=", ".join(setting.seen[:5]))
        point = (setting.seen, setting.absent, setting.training)
        cells += _row(make_unit(context, SOURCE, [SOURCE], 0, *point), SOURCE, setting, ["none"], facts, classes)
        by_training: dict[str, list[str]] = {}
        kept, refusals = _possible(recipes, calibrations, _has_absent(context, [number[n] for n in setting.absent]))
        refused += [{**setting.labels, **refusal} for refusal in refusals]
        for recipe in kept:
            by_training.setdefault(training_recipe(recipe), []).append(recipe)
        for seed in seeds:
            plans = []
            if any(check_calibration(text)[0] in NEEDS_FOLDS for text in calibrations):
                shape = {"val_share": facts["val_share"], "seed": seed}
                plans = plan_folds(seen_rows, setting.seen, facts["folds"], **shape)
            rows: dict[str, Iterator[Cell]] = {}
            for base, outputs in by_training.items():
                unit = make_unit(context, base, outputs, seed, *point)
                folds = [make_unit(context, base, outputs, seed, *point, plan) for plan in plans]
                rows |= {recipe: _row(unit, recipe, setting, kept[recipe], facts, classes, folds) for recipe in outputs}
            cells += [cell for recipe in kept for cell in rows[recipe]]
    return cells, refused


def _possible(
    recipes: Sequence[str], calibrations: Sequence[str], has_absent: bool
) -> tuple[dict[str, Sequence[str]], list[dict[str, Any]]]:
    """Recipe -> its calibrations, the plain upper bound last and uncalibrated; and the reasons for what is missing."""
    kept: dict[str, Sequence[str]] = {}
    refused: list[dict[str, Any]] = []

    def refuse(recipe: str, calibration: str, why: str) -> None:
        refused.append({"unit": recipe, "kind": "cell", "recipe": recipe, "calibration": calibration, "error": why})

    for recipe in recipes:
        if not is_upper_bound(recipe):
            kept[recipe] = calibrations
        elif not has_absent:
            refuse(recipe, "none", "needs training data of every absent class")
        elif recipe != UPPER_BOUND:
            without = [text for text in calibrations if check_calibration(text)[0] not in NEEDS_FOLDS]
            for text in (text for text in calibrations if text not in without):
                refuse(recipe, text, "pseudo cross-validation is for recipes that train on the seen classes")
            kept[recipe] = without
    return kept | ({UPPER_BOUND: ["none"]} if has_absent else {}), refused


def _has_absent(context: Context, absent: Sequence[int]) -> bool:
    """Whether the training data hold every absent class that is tested, and at least one."""
    there = np.isin(absent, context.train.present())
    tested = np.isin(absent, context.test.present())
    return bool(there.any() and there[tested].all())


def _row(
    unit: Unit,
    recipe: str,
    setting: Setting,
    calibrations: Sequence[str],
    facts: Mapping[str, Any],
    classes: Sequence[str],
    folds: Sequence[Unit] = (),
) -> Iterator[Cell]:
    for calibration in calibrations:
        own = tuple(folds) if check_calibration(calibration)[0] in NEEDS_FOLDS else ()
        decides = {"remaining": facts["remaining"], "criterion": facts["criterion"] if own else None}
        key = fingerprint_of("cell", unit.key, recipe, calibration, [fold.key for fold in own], decides)
        yield Cell(key, recipe, calibration, unit.seed, setting, unit, own, tuple(classes))


def add_request(folder: Path, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Remember what a call asks for.

    Parameters
    ----------
    folder : Path
        Run folder.
    request : mapping
        In JSON form.

    Returns
    -------
    list of dict
        What all calls on the folder asked for, this one among them, oldest first.

    Raises
    ------
    UserError
        The file is damaged.
    """
    path = folder / REQUESTS
    known: list[dict[str, Any]] = []
    if path.exists():
        try:
            known = [dict(one) for one in json.loads(path.read_text(encoding="utf-8"))]
        except (ValueError, TypeError) as error:
            remedy = "remove it: the table then holds the cells of this call alone"
            raise UserError("unreadable record of earlier calls", where=path, given=error, remedy=remedy) from error
    own = json.loads(json.dumps(request))
    if own not in known:
        known.append(own)
        write_json(path, known)
    return known


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of several calls, each once: by setting, recipe and calibration as first asked for, the upper bound last.

    Within one row of the table the order of the seeds stays.
    """
    # The model before fine-tuning is the same cell in every setting, and has a row in each.
    once = list({(str(dict(cell.setting.labels)), cell.key): cell for cell in cells}.values())
    points = _ranks(str(dict(cell.setting.labels)) for cell in once)
    recipes = _ranks(cell.recipe for cell in once) | {SOURCE: -1, UPPER_BOUND: len(once)}
    calibrations = _ranks(cell.calibration for cell in once)

    def place(cell: Cell) -> tuple[int, int, int]:
        point = points[str(dict(cell.setting.labels))]
        return point, recipes[cell.recipe], calibrations[cell.calibration]

    return sorted(once, key=place)


def _ranks(names: Iterable[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys(names))}

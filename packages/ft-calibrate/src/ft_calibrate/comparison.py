"""Every recipe with every calibration on one's own data: which remedy helps, at which gamma, chosen by which data.

The grid of FTC (rows: pre-trained, fine-tuned, HT's recipes, +ALG, +PCV, +gamma*, oracle) as one resumable run. A
recipe is trained once per seed; its logits are cached, and every calibration is computed from them. Units and cells are
named by a hash of everything that decides them, so that a finished one never runs again, also when the grid has grown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.executors import make_executor
from vfm_core.files import atomic_write, jsonable, write_json
from vfm_core.runs import RunDir

from ft_calibrate import compare_rows
from ft_calibrate.compare_cells import Material, check_calibration, measure
from ft_calibrate.compare_grid import REQUESTS, Cell, add_request, grid_cells, in_order
from ft_calibrate.compare_sweep import settings_of_sweep
from ft_calibrate.compare_units import (
    SOURCE,
    UPPER_BOUND,
    Context,
    Unit,
    missing_outputs,
    read_fold_output,
    read_output,
    run_unit,
    unit_facts,
)
from ft_calibrate.groups import class_groups
from ft_calibrate.pcv_folds import EXECUTION, check_choices, settings_of
from ft_calibrate.recipes.spec import parse_recipe
from ft_calibrate.skipped_images import SKIPPED, SkippedImages, merge_skipped, write_skipped
from ft_calibrate.target_data import TargetData, named, target_data

if TYPE_CHECKING:
    from ft_calibrate.tables import LogitTable

__all__ = ["Cell", "Comparison", "compare", "expand_recipes", "run_comparison"]

log = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes
    ----------
    rows : list of dict
        The table: one row per setting, recipe and calibration, over all seeds, of this call and earlier ones.
    failures : list of dict
        Trainings that failed (``kind`` ``"training"``) and calibrations that are not defined for their logits or data
        (``"cell"``), each with the reason; the next start tries them again.
    report : Path
        ``report.html``.
    skipped : dict of str to str
        Pictures that could not be read, and why; they are in ``skipped.csv`` too.
    """

    rows: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    report: Path
    skipped: dict[str, str] = field(default_factory=dict)


def expand_recipes(recipes: Sequence[str]) -> list[str]:
    """Check recipes, turn ``wise:*`` into the sweep a = 0, 0.1 .. 1, leave out what has a row of its own anyway.

    Raises
    ------
    UserError
        An unknown recipe, or none.
    """
    found: list[str] = []
    for text in recipes:
        sweep = [text.replace("wise:*", f"wise:{i / 10:g}") for i in range(11)] if "wise:*" in text else [text]
        found += [one for one in sweep if one not in found]
    for text in found:
        if text != SOURCE:
            parse_recipe(text)
    if not found:
        raise UserError("no recipe", where="--recipes", remedy="write ft,lp")
    return [text for text in found if text not in (SOURCE, UPPER_BOUND)]


def compare(
    model: Any, train: Any, test: Any, seen: Any, recipes: Sequence[str], calibrations: Sequence[str], **options: Any
) -> list[dict[str, Any]]:
    """Compare recipes and calibrations; the table of `run_comparison`, which has the same arguments."""
    return run_comparison(model, train, test, seen, recipes, calibrations, **options).rows


def run_comparison(
    model: Any,
    train: Any,
    test: Any,
    seen: Any,
    recipes: Sequence[str] = ("ft",),
    calibrations: Sequence[str] = ("none", "alg", "oracle"),
    *,
    out: str | Path,
    seeds: Sequence[int] = (0,),
    absent: Any = None,
    remaining: str = "absent",
    sweep: Mapping[str, Sequence[Any]] | None = None,
    folds: int = 3,
    val_share: float = 0.2,
    criterion: str = "balanced",
    executor: str = "local",
    overwrite: bool = False,
    markdown: bool = False,
    n_bootstrap: int = 1000,
    strict: bool = False,
    progress: Progress | None = None,
    title: str = "Comparison of remedies",
    **training: Any,
) -> Comparison:
    """Train every recipe once per seed, calibrate its logits in every way, and write table and report.

    Parameters
    ----------
    model : nn.Module or Classifier
        theta_O.
    train, test : (Tensor, Tensor) or ImageDataset
        Target data. Rows of absent classes in ``train`` are used by the upper bound ``oracle-ft``, by the diagnosis of
        the features (NCM), and by calibrations that say so; recipes are trained on the rows of S only.
    seen, absent
        Names, columns or masks.
    recipes : sequence of str
        As for `fine_tune`; ``wise:*`` is the sweep a = 0, 0.1 .. 1 and shares one training. ``oracle-ft`` is there
        wherever the training data hold every absent class; asked for without them, it is among the failures.
    calibrations : sequence of str
        Keys of `CALIBRATIONS`, ``fixed:G``, ``rate:P``.
    out : path
        Run folder.
    seeds : sequence of int
        One training per seed and recipe.
    remaining : {"absent", "keep", "exclude"}
        What classes outside S and U do.
    sweep : mapping, optional
        Axis -> values, see `settings_of_sweep`.
    folds, val_share, criterion
        Of pseudo cross-validation.
    executor : str
        ``local``, ``local:N`` or ``ray``: where trainings run. The results are the same.
    overwrite : bool
        Start afresh. Otherwise the cells of earlier calls on this folder stay in table and report.
    markdown : bool
        Write the report as Markdown too.
    n_bootstrap : int
        Resamples of the paired intervals against plain ``ft``.
    strict : bool
        An unreadable picture ends its training; otherwise it is left out and listed in ``skipped.csv``.
    progress : callable, optional
        ``progress(iterable, total) -> iterable``.
    title : str
        Of the report.
    **training
        Settings of `fine_tune`; ``device``, ``workers`` and ``cache_dir`` decide no result.

    Returns
    -------
    Comparison

    Raises
    ------
    UserError
        Unknown recipes or calibrations, no row of the seen classes, or a folder of other data, another model or other
        settings: only recipes, calibrations, seeds and the values of an axis may differ. A training
        that fails (a step too large) ends its own cells only.
    """
    from ft_calibrate.compare_report import write_report

    names = expand_recipes(recipes)
    axes = {axis: list(values) for axis, values in (sweep or {}).items()}
    for text in calibrations:
        check_calibration(text)
    check_choices(criterion, remaining=remaining)
    source = named(model, train)
    classes = tuple(source.class_names or ())
    data, held_out = target_data(train, classes, "training data"), target_data(test, classes, "test data")
    execution = {name: training.pop(name) for name in EXECUTION if name in training}
    identity = {"model": source.fingerprint(), "train": data.fingerprint(), "test": held_out.fingerprint()}
    context = Context(source, data, held_out, Path(out), execution, identity, strict)
    facts = {"val_share": val_share, "folds": folds, "criterion": criterion, "remaining": remaining}
    features = cache(lambda: _features(context))

    def grid(request: Mapping[str, Any]) -> tuple[list[Cell], list[dict[str, Any]]]:
        settings = settings_of_sweep(classes, seen, absent, training, request["sweep"], features=features)
        return grid_cells(context, settings, request["recipes"], request["calibrations"], request["seeds"], facts)

    asked = [*names, *([UPPER_BOUND] if UPPER_BOUND in recipes else [])]
    request = {"recipes": asked, "calibrations": list(calibrations), "seeds": list(seeds), "sweep": axes}
    request = json.loads(json.dumps(jsonable(request)))  # as it will be read back
    cells, refused = grid(request)
    config = {**identity, "classes": list(classes), **_decisions(classes, seen, absent, training, axes), **facts}
    with RunDir(out, config, overwrite=overwrite) as run:
        if overwrite:
            _forget(Path(out))
        calls = [(cells, refused) if one == request else grid(one) for one in add_request(Path(out), request)]
        _train(context, run, cells, executor, progress or (lambda units, total: units))
        _measure(context, run, cells, facts)
        mine, cells = cells, in_order([cell for own, _ in calls for cell in own])
        wanted = {cell.key: cell for cell in cells}
        records = {record["unit"]: record for record in run.records() if record["unit"] in wanted}
        rows = compare_rows.table(cells, records, Path(out) / "cells", n_bootstrap)
        units = _units(cells)
        standing = [error for error in run.errors() if error["unit"] in wanted or error["unit"] in units]
        everything = standing + list({str(refusal): refusal for _, own in calls for refusal in own}.values())
        current = {cell.key for cell in mine} | set(_units(mine))
        failures = [error for error in standing if error["unit"] in current] + refused
        skipped = merge_skipped(context.folder(unit) / SKIPPED for unit in units.values())
        write_skipped(Path(out) / SKIPPED, skipped)
        write_json(
            Path(out) / "summary.json", {"rows": rows, "failures": everything, "classes": list(classes), **facts}
        )
        report = write_report(run, context, cells, records, rows, everything, title, facts, markdown)
    return Comparison(rows, failures, report, skipped)


def _decisions(
    classes: Sequence[str], seen: Any, absent: Any, training: Mapping[str, Any], axes: Mapping[str, Any]
) -> dict[str, Any]:
    """What all cells of a run folder share besides model and data; recipes, seeds and values of axes may grow."""
    groups = class_groups(list(classes), seen, absent)
    names = {"seen": groups.names(groups.seen), "absent": groups.names(groups.absent)}
    return {**names, "training": settings_of(training), "sweep": sorted(axes)}


def _units(cells: Sequence[Cell]) -> dict[str, Unit]:
    """The units of some cells by key, trainings before folds."""
    found = {cell.unit.key: cell.unit for cell in cells}
    return found | {unit.key: unit for cell in cells for unit in cell.folds}


def _features(context: Context) -> tuple[Any, Any]:
    """Features of the source model on the training data, for similarity-based splits."""
    from ft_calibrate.extraction import predict_table

    options = {name: context.execution[name] for name in ("device", "workers") if name in context.execution}
    on_error = None if context.strict else SkippedImages()
    table = predict_table(context.source, context.train.rows, on_error=on_error, **options)
    return table.features, table.labels


def _forget(out: Path) -> None:
    import shutil

    for name in ("units", "cells"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (SKIPPED, REQUESTS):
        (out / name).unlink(missing_ok=True)


def _train(context: Context, run: RunDir, cells: Sequence[Cell], executor: str, progress: Progress) -> None:
    """Run the units that an unfinished cell needs and that are not on disk; record those that were not when killed."""
    for unit in _units(cells).values():
        if unit.key not in run.done and not missing_outputs(context, unit):
            run.append({"unit": unit.key, "kind": "training", **unit_facts(context, unit), "seconds": None})
    needed = _units([cell for cell in cells if cell.key not in run.done])
    todo = [unit for unit in needed.values() if missing_outputs(context, unit)]
    outcomes = make_executor(executor).run(run_unit, context, todo)
    for outcome in progress(outcomes, len(todo)):
        unit = todo[outcome.index]
        if outcome.error is not None:
            run.append_error({"unit": unit.key, "kind": "training", **unit.describe(), "error": str(outcome.error)})
            log.warning("%s, seed %d: %s", unit.recipe, unit.seed, outcome.error)
        elif unit.key not in run.done:
            run.append({"unit": unit.key, "kind": "training", **outcome.value})


def _measure(context: Context, run: RunDir, cells: Sequence[Cell], facts: Mapping[str, Any]) -> None:
    """Compute the cells whose units are on disk and that are not recorded yet."""
    for cell in cells:
        if cell.key in run.done or any(_lacks(context, unit, cell.recipe) for unit in (cell.unit, *cell.folds)):
            continue
        output = read_output(context, cell.unit, cell.recipe)
        setting, columns = cell.setting, None
        if facts["criterion"] == "source-floor":
            columns = "pseudo"
        folds = []
        for unit in cell.folds:
            fold = read_fold_output(context, unit, cell.recipe).fold(setting.absent, output.test.classes, columns)
            point = "".join(f", {axis}={value}" for axis, value in setting.labels.items())
            folds.append(replace(fold, name=f"{fold.name} of {cell.recipe}, seed {cell.seed}{point}"))
        groups = class_groups(output.test.classes, list(setting.seen), list(setting.absent))
        options = {"criterion": facts["criterion"], "remaining": facts["remaining"]}
        material = Material(output.train, output.test, groups, output.head, folds, **options)
        own = {"recipe": cell.recipe, "calibration": cell.calibration, "seed": cell.seed}
        try:
            measured = measure(material, cell.calibration)
        except UserError as error:
            run.append_error({"unit": cell.key, "kind": "cell", **own, "error": str(error)})
            log.warning("%s + %s: %s", cell.recipe, cell.calibration, error)
            continue
        with atomic_write(Path(context.out) / "cells" / f"{cell.key}.npz") as temporary:
            np.savez(temporary, allow_pickle=False, rows=_positions(context.test, output.test), **measured.arrays)
        ncm = {f"NCM {key}": output.ncm.get(key) for key in ("U/U", "U/Y", "reference")}
        run.append({"unit": cell.key, "kind": "cell", **own, "setting": setting.labels, **measured.record, **ncm})


def _positions(data: TargetData, table: LogitTable) -> NDArray[np.int64]:
    """Which rows of the data a table holds, ascending: all of them but unreadable pictures."""
    if table.ids is None or len(table) == len(data):
        return np.arange(len(table), dtype=np.int64)
    number = {name: row for row, name in enumerate(getattr(data.rows, "ids"))}  # noqa: B009 - pictures have ids
    return np.asarray([number[name] for name in table.ids], dtype=np.int64)


def _lacks(context: Context, unit: Unit, recipe: str) -> bool:
    return bool(missing_outputs(context, replace(unit, outputs=(recipe,))))

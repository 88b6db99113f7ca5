"""The units of a comparison: one training, or one pseudo model of it, and the tables that are kept of each.

A unit is one training on one choice of seen classes, or on one pseudo split of them (a fold of PCV). Recipes that only
average a fine-tuned model with the source (``wise:a``, ``source-ensemble``) share its training: their tables are
further outputs of the same unit. Units are named by a hash of everything that decides their result, so that a unit that
is on disk never runs again. This part is ours.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vfm_core.files import atomic_write, write_json

from ft_calibrate.pcv_folds import FoldPlan, FoldTable, read_fold, settings_of, write_fold
from ft_calibrate.recipes.spec import RECIPES, Recipe, parse_recipe
from ft_calibrate.skipped_images import SKIPPED, SkippedImages
from ft_calibrate.target_data import Rows, TargetData, fingerprint_of

if TYPE_CHECKING:
    from vfm_core.loading import OnError

    from ft_calibrate.classifier import Classifier
    from ft_calibrate.tables import LogitTable

__all__ = [
    "SOURCE",
    "UPPER_BOUND",
    "Context",
    "Output",
    "Unit",
    "is_upper_bound",
    "make_unit",
    "missing_outputs",
    "read_fold_output",
    "read_output",
    "run_unit",
    "training_recipe",
    "unit_facts",
]

SOURCE = "source"
"""The row of the model before fine-tuning."""
UPPER_BOUND = "oracle-ft"
"""The row of the model that was fine-tuned on target data of all classes."""

Predict = Callable[[Rows], "LogitTable"]


@dataclass(frozen=True, eq=False)
class Context:
    """What the units of a comparison share; sent once to every worker.

    Attributes
    ----------
    source : Classifier
        theta_O.
    train, test : TargetData
        Target data; ``train`` may hold samples of absent classes, which only ``oracle-ft`` and the diagnosis of the
        features read.
    out : Path
        Run folder.
    execution : mapping
        Where and how trainings run (device, workers, cache_dir): nothing that decides a result.
    identity : mapping
        Fingerprints of model and data, for the hashes.
    strict : bool
        Whether an unreadable picture ends the run; otherwise it is left out and noted in the unit's ``skipped.csv``.
    """

    source: Classifier
    train: TargetData
    test: TargetData
    out: Path
    execution: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False

    def skips(self, unit: Unit) -> SkippedImages | None:
        """What the unit tells of unreadable pictures."""
        return None if self.strict else SkippedImages(self.folder(unit) / SKIPPED)

    def folder(self, unit: Unit) -> Path:
        """Where a unit's training and tables lie."""
        return self.out / "units" / unit.key


@dataclass(frozen=True, eq=False)
class Unit:
    """One training and the recipes whose tables it gives.

    Attributes
    ----------
    key : str
        Content hash.
    recipe : str
        The recipe without its averages with the source; ``"source"`` trains nothing.
    seed : int
        Of the training.
    seen, absent : tuple of str
        S and U.
    training : mapping
        Settings, as for `fine_tune`.
    outputs : tuple of str
        Recipes, as the user wrote them.
    plan : FoldPlan or None
        The fold of PCV, or None for the real training.
    """

    key: str
    recipe: str
    seed: int
    seen: tuple[str, ...]
    absent: tuple[str, ...]
    training: Mapping[str, Any]
    outputs: tuple[str, ...]
    plan: FoldPlan | None = None

    def describe(self) -> dict[str, Any]:
        """What it is, for people."""
        fold = None if self.plan is None else self.plan.number
        return {"recipe": self.recipe, "seed": self.seed, "fold": fold, "training": settings_of(self.training)}


def is_upper_bound(recipe: str) -> bool:
    """Whether a recipe trains on labels of absent classes, whatever is added to it: an upper bound, not deployable.

    Examples
    --------
    >>> is_upper_bound("oracle-ft + swa"), is_upper_bound("ft"), is_upper_bound("source")
    (True, False, False)
    """
    return recipe != SOURCE and UPPER_BOUND in parse_recipe(recipe)


def training_recipe(recipe: str) -> str:
    """The part of a recipe that has to be trained: without its averages with the source model.

    Examples
    --------
    >>> training_recipe("wise:0.3"), training_recipe("lolsgd+distill+source-ensemble")
    ('ft', 'lolsgd+distill')
    """
    if recipe == SOURCE:
        return SOURCE
    parts = parse_recipe(recipe).parts
    if "cosine-head" in parts:  # its average is with the source under a new head, which only the training itself has
        return parse_recipe(recipe).text
    kept = {name: options for name, options in parts.items() if RECIPES[name].kind != "after"}
    return Recipe(kept).text or "ft"


def make_unit(
    context: Context,
    recipe: str,
    outputs: Sequence[str],
    seed: int,
    seen: Sequence[str],
    absent: Sequence[str],
    training: Mapping[str, Any],
    plan: FoldPlan | None = None,
) -> Unit:
    """Name a unit by its content; arguments as the attributes of `Unit`."""
    facts: dict[str, Any] = {**context.identity, "recipe": recipe, "seen": sorted(seen), "absent": sorted(absent)}
    if recipe != SOURCE:
        facts |= {"seed": seed, "training": settings_of(training)}
    if plan is not None:
        rows = {"train_rows": plan.train_rows, "val_rows": plan.val_rows}
        facts |= {"fold": plan.number, "pseudo_seen": plan.pseudo_seen, **rows}
    key = fingerprint_of(facts)
    return Unit(key, recipe, seed, tuple(seen), tuple(absent), dict(training), tuple(outputs), plan)


def _path(context: Context, unit: Unit, output: str, part: str) -> Path:
    return context.folder(unit) / f"{fingerprint_of(_canonical(output))}.{part}.npz"


def _canonical(output: str) -> str:
    return output if output == SOURCE else parse_recipe(output).text


def missing_outputs(context: Context, unit: Unit) -> tuple[str, ...]:
    """The outputs of a unit that are not on disk."""
    last = "fold" if unit.plan is not None else "test"  # written last, so its presence tells of the others
    return tuple(output for output in unit.outputs if not _path(context, unit, output, last).exists())


def run_unit(context: Context, unit: Unit) -> dict[str, Any]:
    """Train a unit, or find its training done, and write the tables that are missing.

    Returns
    -------
    dict
        Description of the unit, with the wall time in seconds.
    """
    began = time.perf_counter()
    todo = missing_outputs(context, unit)
    on_error = context.skips(unit)
    before = _predictor(context.source, context, on_error)
    seen_rows = _seen_rows(context, unit)
    tuned = None if unit.recipe == SOURCE or not todo else _trained(context, unit, seen_rows, on_error)
    for output in todo:
        model = context.source if tuned is None else _averaged(context, tuned, output, unit.recipe)
        after = before if tuned is None else _predictor(model, context, on_error)
        if unit.plan is not None:
            write_fold(_path(context, unit, output, "fold"), before, after, seen_rows, unit.plan)
        else:
            tested = after if on_error is None else _predictor(model, context, on_error.of("test"))
            _write_tables(context, unit, output, (after(context.train.rows), tested(context.test.rows)), model)
    return {**unit_facts(context, unit), "seconds": time.perf_counter() - began}


def unit_facts(context: Context, unit: Unit) -> dict[str, Any]:
    """Description of a unit with the number of its training rows, whoever ran it."""
    if unit.plan is not None:
        rows = len(unit.plan.train_rows)
    else:
        rows = len(_all_rows(context) if is_upper_bound(unit.recipe) else _seen_rows(context, unit))
    return {**unit.describe(), "n_train": rows}


def _all_rows(context: Context) -> TargetData:
    return context.train.of(context.train.present())


def _seen_rows(context: Context, unit: Unit) -> TargetData:
    number = {name: column for column, name in enumerate(context.train.classes)}
    return context.train.of(number[name] for name in unit.seen)


def _trained(context: Context, unit: Unit, seen_rows: TargetData, on_error: OnError | None) -> Classifier:
    from ft_calibrate.recipes import fine_tune

    seen, absent, data = list(unit.seen), list(unit.absent), seen_rows
    if unit.plan is not None:
        seen, data = list(unit.plan.pseudo_seen), seen_rows.take(unit.plan.train_rows)
        absent += unit.plan.pseudo_absent
    elif is_upper_bound(unit.recipe):
        data = _all_rows(context)
    options = {**unit.training, **context.execution, "seed": unit.seed, "absent": absent, "on_error": on_error}
    run = fine_tune(context.source, data.rows, seen, unit.recipe, out=context.folder(unit) / "training", **options)
    tuned: Classifier = run.classifier
    return tuned


def _averaged(context: Context, tuned: Classifier, output: str, unit_recipe: str) -> Classifier:
    """The fine-tuned model after the recipe's averages with the source: weights first, then predictions."""
    from ft_calibrate.recipes.averaging import SourceEnsemble, interpolate

    if unit_recipe == parse_recipe(output).text:
        return tuned
    model, head = tuned.model, tuned.head_name
    source = copy.deepcopy(context.source.model).to(tuned.device)  # the training may have run on another device
    averages = parse_recipe(output).of_kind("after")
    if "wise" in averages:
        model = interpolate(source, model, averages["wise"]["a"])
    if "source-ensemble" in averages:
        model = SourceEnsemble(source, model, averages["source-ensemble"]["mean"])
        head = f"tuned.{head}" if head else "tuned"
    return replace(tuned, model=model.eval(), head_name=head, _fingerprint=None)


def _predictor(classifier: Classifier, context: Context, on_error: OnError | None) -> Predict:
    from ft_calibrate.extraction import predict_table

    options = {name: context.execution[name] for name in ("device", "workers") if name in context.execution}
    return lambda rows: predict_table(classifier, rows, on_error=on_error, **options)


def _write_tables(
    context: Context, unit: Unit, output: str, tables: tuple[LogitTable, LogitTable], model: Classifier
) -> None:
    from torch import nn

    from ft_calibrate.head import base_layer
    from ft_calibrate.tables import write_table

    train, test = tables
    write_table(replace(train, features=None), _path(context, unit, output, "train"))
    write_json(_path(context, unit, output, "ncm").with_suffix(".json"), _ncm(train, test, unit))
    head = base_layer(model.head)
    if isinstance(head, nn.Linear) and "source-ensemble" not in output:  # only there does a row's norm scale a logit
        arrays = {"weight": head.weight.detach().cpu().numpy()}
        arrays |= {} if head.bias is None else {"bias": head.bias.detach().cpu().numpy()}
        with atomic_write(_path(context, unit, output, "head")) as temporary:
            np.savez(temporary, allow_pickle=False, **arrays)
    write_table(replace(test, features=None), _path(context, unit, output, "test"))


def _ncm(train: LogitTable, test: LogitTable, unit: Unit) -> dict[str, Any]:
    """Accuracy of the nearest class mean among the absent classes: what the features are worth, head aside."""
    from ft_calibrate.metrics import accuracy_decomposition
    from ft_calibrate.ncm import class_means, ncm_scores

    if train.features is None or test.features is None or train.labels is None or test.labels is None:
        return {}
    k = test.num_classes
    tested = {test.classes.index(name) for name in unit.absent} & set(test.labels.tolist())
    if tested <= set(train.labels.tolist()):
        reference = "training data of all classes"
        scores = ncm_scores(test.features, class_means(train.features, train.labels, k), k)
    else:
        reference = "test data, leaving the sample itself out"
        scores = ncm_scores(test.features, (test.features, test.labels), k, leave_one_out=True)
    groups: dict[str, Any] = {"seen": unit.seen, "absent": unit.absent, "classes": test.classes}
    found = accuracy_decomposition(np.asarray(scores), test.labels, topk=(1,), remaining="exclude", **groups)
    return {key: found[key] for key in ("U/U", "U/Y", "S/Y")} | {"reference": reference}


# --------------------------------------------------------------------------------------------------- reading them back
@dataclass(frozen=True, eq=False)
class Output:
    """What a unit keeps of one recipe.

    Attributes
    ----------
    train, test : LogitTable
        On all training rows, and on the test data.
    ncm : dict
        Accuracies of the nearest class mean, and the samples it took the means from.
    head : dict of str to ndarray
        ``weight`` (K, D) and ``bias`` (K,) of a linear head; empty for others.
    """

    train: LogitTable
    test: LogitTable
    ncm: dict[str, Any]
    head: dict[str, Any]


def read_output(context: Context, unit: Unit, output: str) -> Output:
    """Read back what `run_unit` wrote for one recipe."""
    import json

    from ft_calibrate.tables import read_table

    train, test = (read_table(_path(context, unit, output, part)) for part in ("train", "test"))
    path = _path(context, unit, output, "ncm").with_suffix(".json")
    ncm = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    head: dict[str, Any] = {}
    if (weights := _path(context, unit, output, "head")).exists():
        with np.load(weights, allow_pickle=False) as stored:
            head = {name: stored[name] for name in stored.files}
    return Output(train, test, ncm, head)


def read_fold_output(context: Context, unit: Unit, output: str) -> FoldTable:
    """The fold's logits for a recipe."""
    assert unit.plan is not None
    return read_fold(_path(context, unit, output, "fold"), unit.plan)

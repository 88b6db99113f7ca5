"""Run an experiment of the papers on the user's copy of the data, and check the papers' claims on the own numbers.

FTC (arXiv 2409.16223) and HT (arXiv 2311.01420). Every target domain is a comparison of its own
(`ft_calibrate.comparison`), resumable by itself; this file makes the source models, puts the target domains together,
tests the claims of `ft_calibrate.experiments` and sets the papers' cells beside the own ones where a person has filled
them in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vfm_core.data import ImageDataset, open_dataset
from vfm_core.errors import UserError, unknown_name
from vfm_core.files import write_json
from vfm_core.preprocess import Preprocess
from vfm_core.runs import RunDir

from ft_calibrate.compare_rows import MEASURES
from ft_calibrate.compare_units import SOURCE, is_upper_bound
from ft_calibrate.comparison import Comparison, Progress, run_comparison
from ft_calibrate.experiments import BEST_OF_HT, Case, Experiment, Key, find_experiment
from ft_calibrate.pcv_folds import settings_of
from ft_calibrate.recipes.spec import RECIPES, parse_recipe
from ft_calibrate.reproduce_report import experiment_report, read_reference
from ft_calibrate.skipped_images import SKIPPED, SkippedImages, read_skipped, write_skipped
from ft_calibrate.target_data import fingerprint_of

if TYPE_CHECKING:
    from ft_calibrate.classifier import Classifier
    from ft_calibrate.splits import Split

__all__ = ["QUICK", "Reproduction", "reproduce"]

log = logging.getLogger(__name__)

QUICK: dict[str, Any] = {"epochs": 1, "steps_per_epoch": 2, "batch_size": 16}
"""Settings of a trial run, which shows that everything works and nothing else."""
QUICK_ROWS = 6  # per class


@dataclass(frozen=True)
class Reproduction:
    """A finished experiment.

    Attributes
    ----------
    rows : list of dict
        Mean over target domains of every recipe and calibration, ``cases`` says over how many.
    cases : dict of str to list of dict
        The table of every target domain.
    checks : list of dict
        ``claim``, ``left``, ``relation``, ``right``, ``holds`` (True, False, or None where a number is missing).
    reference : dict
        What ``reference_cells/NAME.json`` holds.
    failures : list of dict
        Units that failed.
    report : Path
        ``report.html``.
    skipped : dict of str to str
        Pictures that could not be read, and why; they are in ``skipped.csv`` too.
    """

    rows: list[dict[str, Any]]
    cases: dict[str, list[dict[str, Any]]]
    checks: list[dict[str, Any]]
    reference: dict[str, Any]
    failures: list[dict[str, Any]]
    report: Path
    skipped: dict[str, str] = field(default_factory=dict)


def reproduce(
    name: str,
    data_root: str | Path,
    *,
    out: str | Path,
    quick: bool = False,
    model: str | None = None,
    source_ckpt: str | None = None,
    recipes: Sequence[str] | None = None,
    calibrations: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] = (0,),
    image_size: int | None = None,
    executor: str = "local",
    overwrite: bool = False,
    markdown: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
    device: Any = None,
    workers: int = 0,
    **training: Any,
) -> Reproduction:
    """Run one experiment.

    Parameters
    ----------
    name : str
        Key of `EXPERIMENTS`.
    data_root : path
        Where the data lie; nothing is downloaded.
    out : path
        Run folder: one folder per target domain, ``sources/`` for source models.
    quick : bool
        A trial: one short epoch on a few pictures per class, two pseudo splits. Its numbers mean nothing.
    model : str, optional
        Another model than the paper's.
    source_ckpt : str, optional
        Checkpoint of the source model, in place of training it; ``{source}`` stands for the source domain of
        Office-Home (Ar, Rw), ``{case}`` for the target's name.
    recipes, calibrations, cases : sequence of str, optional
        Fewer or other ones than the experiment's.
    sweep : mapping, optional
        As for `run_comparison`; the claims are then checked in the first setting only.
    seeds : sequence of int
        Trainings per recipe.
    image_size : int, optional
        Another side of the pictures, squashed, in pixels.
    executor, overwrite, markdown, strict, progress
        As for `run_comparison`.
    device, workers
        Where it runs.
    **training
        Changes of the experiment's settings.

    Raises
    ------
    UserError
        Unknown experiment or case, missing data or weights.
    """
    experiment = find_experiment(name)
    root = Path(data_root)
    if not root.exists():
        raise UserError("no such folder", where="--data-root", given=str(root), remedy="give the folder of the data")
    chosen = _chosen(experiment.cases(root), cases)
    side = image_size or experiment.image_size
    settings = {**experiment.training, **(QUICK if quick else {}), **training}
    if experiment.augment:
        from ft_calibrate.augment import Augmentation

        settings["augment"] = Augmentation(size=side or 224)
    execution = {"device": device, "workers": workers, "strict": strict}
    done: dict[str, Comparison] = {}
    config = {"experiment": name, "model": model or experiment.model, "quick": quick, "image_size": side}
    with RunDir(out, {**config, "source_ckpt": source_ckpt}, overwrite=overwrite) as run:
        for case in chosen:
            whole = open_dataset(case.train)
            train, test = _limited(whole, quick), _limited(open_dataset(case.test), quick)
            split = _split(case, train)
            prompts = getattr(whole, "templates", None)
            source = _source(experiment, case, config, split, Path(out), prompts, source_ckpt, execution, settings)
            done[case.name] = run_comparison(
                source,
                train,
                test,
                _columns(split.seen, source),
                recipes or experiment.recipes,
                calibrations or experiment.calibrations,
                absent=_columns(split.absent, source),
                out=Path(out) / case.name,
                seeds=seeds,
                remaining=case.remaining,
                sweep=sweep,
                folds=2 if quick else 3,
                executor=executor,
                overwrite=overwrite,
                progress=progress,
                title=f"{experiment.name}: {case.name}",
                **settings,
                **execution,
            )
        found_skips = _all_skips(Path(out), done)
        write_skipped(Path(out) / SKIPPED, found_skips)
        tables = {case: comparison.rows for case, comparison in done.items()}
        rows = _mean_over_cases(list(tables.values()))
        found = Reproduction(
            rows,
            tables,
            _checks(experiment, rows),
            read_reference(name),
            [{"case": case, **failure} for case, comparison in done.items() for failure in comparison.failures],
            run.report_path,
            found_skips,
        )
        write_json(Path(out) / "summary.json", {**config, "settings": settings_of(settings), **found.__dict__})
        experiment_report(experiment, found, config, settings).write(run.report_path, markdown=markdown)
    return found


def _chosen(cases: Sequence[Case], wanted: Sequence[str] | None) -> list[Case]:
    known = {case.name: case for case in cases}
    for name in wanted or ():
        if name not in known:
            raise unknown_name("case", name, known, where="--cases")
    return [known[name] for name in wanted] if wanted else list(cases)


def _limited(data: ImageDataset, quick: bool) -> ImageDataset:
    if not quick:
        return data
    labels = np.asarray(data.labels)
    rows = [np.flatnonzero(labels == label)[:QUICK_ROWS] for label in np.unique(labels[labels >= 0])]
    return data.subset(np.sort(np.concatenate(rows))) if rows else data


def _split(case: Case, train: ImageDataset) -> Split:
    """The reference split, or half of the classes that the target domain has, drawn with seed 0 (ours)."""
    from ft_calibrate.splits import Split, make_split, official_split

    if case.split is not None:
        return official_split(case.split)
    labels = np.asarray(train.labels)
    present = [train.classes[int(label)] for label in np.unique(labels[labels >= 0])]
    if len(present) < 2:
        raise UserError("too few classes to leave some out", where=case.name, given=", ".join(present))
    drawn = make_split(present, share=0.5, seed=0)
    absent = tuple(name for name in train.classes if name not in drawn.seen)
    return Split(tuple(train.classes), tuple(drawn.seen), absent, f"half of {case.name}", "random", 0)


def _columns(names: Sequence[str], source: Classifier) -> list[int]:
    from ft_calibrate.extraction import columns_of

    return [int(column) for column in columns_of(list(names), source.class_names, source.spec)]


# -------------------------------------------------------------------------------------------------------- source models
def _source(
    experiment: Experiment,
    case: Case,
    config: Mapping[str, Any],
    split: Split,
    out: Path,
    prompts: Sequence[str] | None,
    source_ckpt: str | None,
    execution: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Classifier:
    """theta_O of a case: loaded, or trained on the source domain from the experiment's model with a new head."""
    from ft_calibrate.classifier import load_classifier

    spec, side, place = config["model"], config["image_size"], execution["device"] or "cpu"
    if source_ckpt is not None:
        domain = case.name.partition("-")[0]
        path = source_ckpt.format(source=domain, case=case.name)
        found = load_classifier(spec, source_ckpt=path, classes=list(split.classes), device=place)
    elif case.source is None:
        found = load_classifier(spec, classes=list(split.classes), template=prompts, device=place)
    else:
        found = _with_new_head(load_classifier(spec, device=place), list(split.classes))
    if side is not None:
        own = found.preprocess or Preprocess()
        squashed = replace(own, size=(side, side), resize="squash", crop_pct=1.0, interpolation="bilinear")
        found = replace(found, preprocess=squashed, _fingerprint=None)
    if source_ckpt is not None or case.source is None:
        return found
    return _trained_source(experiment, case, config, found, out, execution, settings)


def _with_new_head(base: Classifier, classes: Sequence[str]) -> Classifier:
    """The model with a fresh linear head for other classes; its weights depend on nothing but their shape."""
    import torch
    from torch import nn

    from ft_calibrate.recipes.run import replace_head

    bound = 1 / math.sqrt(base.feature_dim)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(base.feature_dim, len(classes), device="meta").to_empty(device=base.device)
    with torch.no_grad():
        for tensor in (head.weight, head.bias):
            tensor.copy_((2 * torch.rand(tensor.shape, generator=generator) - 1) * bound)
    replace_head(base.model, base.head_name, head)
    return replace(base, class_names=list(classes), _fingerprint=None)


def _trained_source(
    experiment: Experiment,
    case: Case,
    config: Mapping[str, Any],
    start: Classifier,
    out: Path,
    execution: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Classifier:
    from ft_calibrate.recipes import fine_tune

    assert case.source is not None
    data = open_dataset(case.source)
    if case.without is not None:
        kept = [i for i in range(len(data)) if str(data.meta_of(i).get("group")) != case.without]
        data = data.subset(kept)
    data = _limited(data, bool(config["quick"]))
    own = {**experiment.source_training, **(QUICK if config["quick"] else {})}
    if "augment" in settings:
        own["augment"] = settings["augment"]
    key = fingerprint_of(start.fingerprint(), data.fingerprint(), config["image_size"], settings_of(own))
    labels = np.asarray(data.labels)
    present = [data.classes[int(label)] for label in np.unique(labels[labels >= 0])]
    log.info("source model of %s: %d pictures, %d classes", case.name, len(data), len(present))
    folder = out / "sources" / key
    own |= {name: execution[name] for name in ("device", "workers")}
    own["on_error"] = None if execution["strict"] else SkippedImages(folder / SKIPPED)
    run = fine_tune(start, data, present, "ft", out=folder, seed=0, **own)
    trained: Classifier = run.classifier
    return trained


def _all_skips(out: Path, done: Mapping[str, Comparison]) -> dict[str, str]:
    """Unreadable pictures of all target domains and of the source data; a picture of two domains is listed twice."""
    found = {f"{case}: {name}": why for case, one in done.items() for name, why in one.skipped.items()}
    for path in sorted((out / "sources").glob(f"*/{SKIPPED}")):
        found |= {f"source: {name}": why for name, why in read_skipped(path).items()}
    return found


# -------------------------------------------------------------------------------------------------- putting it together
def _mean_over_cases(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Mean over target domains; a row that a domain lacks is averaged over the others, and says over how many."""
    grouped: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for table in tables:
        for row in table:
            axes = list(row)[: list(row).index("recipe")]
            grouped.setdefault((*(f"{a}={row[a]}" for a in axes), row["recipe"], row["calibration"]), []).append(row)
    rows = []
    for group in grouped.values():
        first = group[0]
        row = {name: first[name] for name in list(first)[: list(first).index("recipe") + 2]}
        spread: dict[str, float | None] = {}
        for name in MEASURES:
            values = [r[name] for r in group if r.get(name) is not None]
            if any(name in r for r in group):
                row[name] = float(np.mean(values)) if values else None
                spread[name] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        keep = ("gamma from", "effect", "absent labels", "upper bound", "NCM reference", "seeds")
        rows.append({**row, **{name: first.get(name) for name in keep}, "cases": len(group), "sd": spread})
    return rows


def _checks(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    values: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        values.setdefault((row["recipe"], row["calibration"]), row)
    found = []
    for check in experiment.checks:
        keys = [_resolved(key, values) for key in (check.left, check.right)]
        left, right = (values.get(key[:2], {}).get(key[2]) for key in keys)
        holds = None if left is None or right is None else check.holds(left, right)
        names = [f"{key[2]} of {key[0]}" + (f" + {key[1]}" if key[1] != "none" else "") for key in keys]
        inequality = f"{names[0]} {check.relation} {names[1]}"
        found.append({"claim": check.claim, "inequality": inequality, "left": left, "right": right, "holds": holds})
    return found


def _resolved(key: Key, values: Mapping[tuple[str, str], Mapping[str, Any]]) -> Key:
    """The key with the name of HT's best recipe in the table where it asks for that."""
    recipe, calibration, column = key
    if recipe != BEST_OF_HT:
        return key
    there = {
        name: row[column]
        for (name, with_), row in values.items()
        if with_ == calibration and _is_of_ht(name) and row.get(column) is not None
    }
    return (max(there, key=lambda name: there[name]), calibration, column) if there else key


def _is_of_ht(recipe: str) -> bool:
    """Whether a recipe has a part that HT proposes or compares with, and FTC does not build on."""
    if recipe == SOURCE or is_upper_bound(recipe):
        return False
    return any(RECIPES[part].origin.startswith("HT") for part in parse_recipe(recipe).parts)

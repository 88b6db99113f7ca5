"""`evaluate` as a resumable run: one unit per method, a table, a report and the raw scores as JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vfm_core.errors import unknown_name
from vfm_core.files import write_json
from vfm_core.report import Report
from vfm_core.runs import RunDir

from finecam.arms import ABLATIONS, Arm, ArmMaps, arms_of
from finecam.classifiers import Classifier
from finecam.data import ImageDataset, open_dataset
from finecam.evaluation import Evaluation, Scoring, evaluate
from finecam.explainer import Explainer
from finecam.families import FAMILIES
from finecam.metrics import half_cell
from finecam.result import CAMResult
from finecam.sanity import randomization_cascade

VERSION = 2
"""Raised when a score's meaning changes, so that an old run folder is not continued."""


@dataclass
class EvaluationRun:
    """Tables of a finished evaluation.

    Parameters
    ----------
    table
        One row per method and strength, means with 95 % intervals.
    differences
        Each arm against its plain method on the same images.
    ids
        Images scored.
    accuracy
        Of the model on all labelled images.
    skipped
        Unreadable images.
    report
        The page.
    radius
        Tolerance of the pointing game in pixels, one for all arms.
    relations
        Similarity rule -> how the most similar classes relate to the true one -> how often.
    used
        The same for the references that each arm used.
    curves
        Arm -> mean deletion curves of "target" and "look-alike", where asked for.
    sanity
        One row per destroyed stage of the model: mean rank correlation of each arm's maps with the original ones.
    """

    table: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    ids: list[str]
    accuracy: float
    skipped: list[tuple[str, str]]
    report: Path
    radius: float
    relations: dict[str, dict[str, int]] = field(default_factory=dict)
    used: dict[str, dict[str, int]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    sanity: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def related(self) -> list[str]:
        """How references relate to the true class, a line for each set of arms that used the same ones."""
        lines: dict[str, list[str]] = {}
        for arm, counts in self.used.items():
            lines.setdefault(shares(counts), []).append(arm)
        if len(lines) == 1:
            return [f"references: {line}" for line in lines]
        return [f"references of {', '.join(arms)}: {line}" for line, arms in lines.items()]

    def by_metric(self) -> list[dict[str, Any]]:
        """The table turned for a terminal: a row per metric, a column per arm; intervals where there is room."""
        metrics = [key for key in self.table[0] if key not in ("arm", "n")]

        def cell(value: Any) -> Any:
            return value[0] if isinstance(value, tuple) and len(self.table) > 4 else value

        return [{"metric": key} | {row["arm"]: cell(row.get(key)) for row in self.table} for key in metrics]


def shares(counts: Mapping[str, int]) -> str:
    """Counts as percentages, the largest first: "sibling 71%, other 29%"."""
    every = sum(counts.values()) or 1
    return ", ".join(f"{name} {n / every:.0%}" for name, n in sorted(counts.items(), key=lambda item: -item[1]))


def run_evaluation(
    data: str | ImageDataset,
    classifier: Classifier,
    out: str | os.PathLike[str],
    *,
    methods: Sequence[str] = ("gradcam", "layercam"),
    gammas: Sequence[float] = (0.0, 0.6, 1.0),
    scoring: Scoring | None = None,
    settings: Mapping[str, Any] | None = None,
    ablation: str | None = None,
    sanity: int = 0,
    layer: str | None = None,
    correct_only: bool = True,
    limit: int | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> EvaluationRun:
    """Score methods one after the other into a run folder; the same call again does only what is missing.

    Parameters
    ----------
    data, classifier, methods, gammas, scoring, layer, correct_only, limit, batch_size, workers, device
        As in `evaluate`.
    out
        Run folder: ``results.jsonl`` (raw scores per method), ``evaluation.json`` (tables), ``report.html``.
    settings
        Further fields of every contrastive `Arm`: references, similarity, weighting, aggregate.
    ablation
        Compare one of the named sets of arms (`ABLATIONS`) of each method; `gammas` and `settings` do not enter then.
    sanity
        Images on which the model is destroyed stage by stage (`randomization_cascade`); 0 leaves it out.
    overwrite
        Start afresh.
    progress
        Wraps the iterable of methods.

    Raises
    ------
    UserError
        As `evaluate`; an unknown ablation or method.
    """
    for method in methods:
        if method not in FAMILIES:
            raise unknown_name("method", method, FAMILIES, where="methods")
    if ablation is not None and ablation not in ABLATIONS:
        raise unknown_name("ablation", ablation, ABLATIONS)
    dataset = data if isinstance(data, ImageDataset) else open_dataset(data)
    scoring = scoring or Scoring()
    # Every arm is compared with its plain method, so that one is always there.
    strengths = tuple(dict.fromkeys((0.0, *gammas)))
    arms: dict[str, list[Arm]] = {
        method: ABLATIONS[ablation](method) if ablation else arms_of([method], strengths, **(settings or {}))
        for method in methods
    }
    # Where no class enters, no reference can change a map: the plain arm says it all.
    arms = {method: [arm for arm in some if arm.plain or FAMILIES[method].asks] for method, some in arms.items()}
    if scoring.radius is None:  # methods are scored one after the other, with one radius
        every = ArmMaps(classifier, [arm for some in arms.values() for arm in some], layer)
        scoring = replace(scoring, radius=half_cell(every.grid(), classifier.preprocess.size))
    config = {
        "version": VERSION,
        "data": dataset.name,
        "data_fingerprint": dataset.fingerprint(),
        "model": classifier.spec,
        "model_sha256": classifier.fingerprint,
        "gammas": strengths,
        "scoring": asdict(scoring),
        "settings": dict(settings or {}),
        "ablation": ablation,
        "sanity": sanity,
        "layer": layer,
        "correct_only": correct_only,
        "limit": limit,
    }
    with RunDir(Path(out), config, overwrite=overwrite) as run:
        todo = [method for method in methods if method not in run.done]
        for method in progress(todo, len(todo)) if progress else todo:
            found = evaluate(
                dataset,
                classifier,
                arms=arms[method],
                scoring=scoring,
                layer=layer,
                correct_only=correct_only,
                limit=limit,
                batch_size=batch_size,
                workers=workers,
                device=device,
            )
            for image, reason in found.skipped:
                run.append_error({"unit": image, "error": reason})
            ids = found.ids[:sanity]
            rows = _sanity(dataset, classifier, arms[method], ids, layer, batch_size) if sanity else []
            run.append({"unit": method, "evaluation": found.to_dict(), "sanity": rows})
        records = {r["unit"]: r for r in run.records()}
        parts = [Evaluation.from_dict(records[method]["evaluation"]) for method in methods]
        done = _joined(parts, [records[method]["sanity"] for method in methods], run.report_path)
        write_json(run.path / "evaluation.json", done.to_dict())
        _report(done, classifier, dataset)
    return done


def _sanity(
    dataset: ImageDataset,
    classifier: Classifier,
    arms: Sequence[Arm],
    ids: Sequence[str],
    layer: str | None,
    batch: int,
) -> list[dict[str, Any]]:
    """Stage by stage, how like the original the maps of the plain and of the first contrastive arm still are."""
    device = next(classifier.model.parameters()).device
    images = [dataset[dataset.ids.index(name)] for name in ids]
    x = torch.stack([classifier.preprocess(image.image) for image in images]).to(device)
    plain = [arm for arm in arms if arm.plain][:1]
    contrastive = [arm for arm in arms if not arm.plain and arm.rank is None and FAMILIES[arm.method].asks][:1]
    rows: dict[str, dict[str, Any]] = {}
    for arm in plain + contrastive:
        explained = partial(_explained, classifier, arm, layer or classifier.layer, batch, x)
        asked = explained(None, None if arm.plain else arm.references, classifier.model)
        # The question stays the original model's while its answer is destroyed.
        again = partial(explained, asked.target, asked.references if asked.references.shape[1] else None)

        def maps_of(model: torch.nn.Module, again: Callable[..., CAMResult] = again) -> torch.Tensor:
            return again(model).maps

        cascade = randomization_cascade(classifier.model, maps_of)
        for stage, values in zip(cascade.stages, cascade.spearman):
            name = stage or "own parameters"
            rows.setdefault(name, {"destroyed down to": name})[arm.name] = round(float(values.nanmean()), 3)
    return list(rows.values())


def _explained(
    classifier: Classifier,
    arm: Arm,
    layer: str | None,
    batch: int,
    x: torch.Tensor,
    target: torch.Tensor | None,
    references: torch.Tensor | int | None,
    model: torch.nn.Module,
) -> CAMResult:
    explain = Explainer(
        model, layer, arm.method, classifier.reshape, batch_size=batch, class_weights=classifier.weights()
    )
    return explain(
        x, target, references, arm.similarity, arm.gamma, arm.weighting, arm.aggregate,
        ablation=arm.aggregate == "map_subtraction",
    )  # fmt: skip


def _joined(parts: Sequence[Evaluation], sanity: Sequence[Sequence[dict[str, Any]]], report: Path) -> EvaluationRun:
    table: list[dict[str, Any]] = []
    for part in parts:  # the baselines (random map, Gaussian) come with every method: once is enough
        known = {row["arm"] for row in table}
        table += [row for row in part.table() if row["arm"] not in known]
    differences = [row for part in parts for row in part.differences()]
    used = {arm: dict(counts) for part in parts for arm, counts in part.used.items() if counts}
    curves = {arm: curve for part in parts for arm, curve in part.curves.items()}
    stages: dict[str, dict[str, Any]] = {}
    for rows in sanity:
        for row in rows:
            stages.setdefault(row["destroyed down to"], {}).update(row)
    first = parts[0]
    return EvaluationRun(
        table, differences, first.ids, first.accuracy, first.skipped, report, first.radius,
        {rule: dict(counts) for rule, counts in first.relations.items()}, used, curves, list(stages.values()),
    )  # fmt: skip


def _report(done: EvaluationRun, classifier: Classifier, dataset: ImageDataset) -> None:
    report = Report("finecam evaluate", f"{classifier.spec} on {dataset.name}")
    report.text(
        f"{len(done.ids)} images, accuracy {done.accuracy:.1%}. Means with 95% bootstrap intervals; lower is better "
        "for deletion and average drop, higher for everything else. All arms are scored on the same images against the "
        f"same look-alike classes; pointing counts within {done.radius:g} pixels. 'difference' holds the pixels that "
        "tell the true class from the references an arm used, so it varies with the rule that chose them."
    )
    if classifier.weights() is None:
        report.text("The head has no weight row per class: relative drop under 'weight' is left out.")
    report.heading("Scores")
    report.table(done.table)
    report.heading("Against the plain method")
    report.text("The plain method is scored on each arm's own 'difference'.")
    report.table(done.differences)
    if done.relations or done.used:
        report.heading("What the references are to the true class")
        rows = [{"classes": f"most similar by {rule}", "are": shares(n)} for rule, n in done.relations.items()]
        report.table(rows + [{"classes": f"used by {arm}", "are": shares(n)} for arm, n in done.used.items()])
    if done.curves:
        report.heading("Deletion curves")
        report.figure(_curve_figure(done.curves), "Mean probability while the top pixels go", "deletion curves")
    if done.sanity:
        report.heading("Do the maps depend on what the model learned?")
        report.text("Rank correlation with the original maps while the model is destroyed from the head downwards.")
        report.table(done.sanity)
    if done.skipped:
        report.heading("Unreadable images")
        report.table([{"image": image, "reason": reason} for image, reason in done.skipped])
    report.write(done.report)


def _curve_figure(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Any:
    """Finer-CAM, Fig. 5: a colour per arm, the target drawn through, its look-alike dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for k, (arm, curve) in enumerate(curves.items()):
        for name, style in (("target", "-"), ("look-alike", "--")):
            values = curve[name]
            at = [i / (len(values) - 1) for i in range(len(values))]
            axis.plot(at, values, style, color=f"C{k % 10}", label=arm if name == "target" else None)
    axis.set(xlabel="share of the pixels deleted", ylabel="probability (target -, look-alike --)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    return figure

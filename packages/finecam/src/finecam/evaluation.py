"""How good are the maps? Every arm on the same images, scored on the pixels that tell the classes apart.

The tables of Finer-CAM (arXiv 2501.11309): localisation and relative drop (Tab. 1), references (Tab. 2), aggregation
(Tab. 7), strength (Fig. 6b), deletion curves (Fig. 5). Three rules keep the comparison fair. Every arm, the plain one
included, is scored against the same look-alike class d. Relative drop is reported for two choices of d, because a map
that was built against the class with the nearest logit is at home on that class. The region "difference" holds the
pixels that tell the image's class from the references that an arm really used (the nearest logits for an arm without
references), and an arm is compared with its plain method on the arm's own region.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vfm_core.data import ImageDataset
from vfm_core.errors import UserError
from vfm_core.loading import loader
from vfm_core.metrics import bootstrap_interval, paired_difference

from finecam import metrics
from finecam.arms import Arm, ArmMaps, arms_of
from finecam.classifiers import Classifier, load_classifier
from finecam.data import open_dataset
from finecam.layers import logits_of
from finecam.references import similar_classes
from finecam.regions import EMPTY, EXTRAS, Differences, Scoring, located, regions_of, score_maps
from finecam.sanity import center_gaussian, random_maps

__all__ = ["EXTRAS", "Evaluation", "Scoring", "evaluate", "score_maps"]

BASELINES = ("random map", "centre Gaussian")


@dataclass
class Evaluation:
    """Per-image scores of all arms.

    Attributes
    ----------
    values : dict of str to dict of str to ndarray
        Arm name -> metric -> (N,) values, NaN where a map is empty or there is no such region; under "empty", 1 where
        the map is.
    ids : list of str
        The N images: those with a label that the model classifies correctly, unless all were asked for.
    accuracy : float
        Of the model on all labelled images.
    relations : dict of str to Counter
        Similarity rule -> how the T most similar classes relate to the true one ("sibling", "same mark", "other"),
        where the dataset knows.
    bases : dict of str to str
        Arm name -> name of its plain arm.
    skipped : list of (str, str)
        Unreadable images and why.
    radius : float
        Tolerance of the pointing game in pixels.
    matched : dict of str to dict of str to ndarray
        Arm name -> metric -> values of its plain arm on the arm's own region, where that is not the plain arm's.
    used : dict of str to Counter
        Arm name -> how the references that it used relate to the true class, where the dataset knows.
    curves : dict of str to dict of str to list
        Arm name -> "target" and "look-alike" -> mean probability while the top pixels go, with the extra "curve_area".
    """

    values: dict[str, dict[str, np.ndarray]]
    ids: list[str]
    accuracy: float
    relations: dict[str, Counter[str]]
    bases: dict[str, str]
    skipped: list[tuple[str, str]]
    radius: float = float("nan")
    matched: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    used: dict[str, Counter[str]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def table(self, *names: str) -> list[dict[str, Any]]:
        """One row per arm: mean [95 % bootstrap interval] of each metric (all, or those named), and empty maps."""
        rows = []
        for arm, scores in self.values.items():
            row: dict[str, Any] = {"arm": arm}
            shown = names or [name for name in scores if name != EMPTY]
            row |= {name: tuple(bootstrap_interval(scores[name])) for name in shown if name in scores}
            rows.append(row | {"n": len(self.ids), "empty": self.n_empty(arm)})
        return rows

    def differences(self, *names: str) -> list[dict[str, Any]]:
        """One row per arm and metric: difference to the plain method on the same images, interval, sign-flip p."""
        rows = []
        for arm, base in self.bases.items():
            if arm == base or base not in self.values:
                continue
            plain = self.values[base] | self.matched.get(arm, {})
            for name in names or [name for name in self.values[arm] if name != EMPTY]:
                d = paired_difference(self.values[arm][name], plain[name])
                rows.append({"arm": arm, "metric": name, "difference": (d.difference, d.low, d.high), "p": d.p})
        return rows

    def n_empty(self, arm: str) -> int:
        """Images whose map is empty: excluded from every mean."""
        return int(self.values[arm][EMPTY].sum())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; NaN becomes None."""
        return {
            "accuracy": self.accuracy, "ids": self.ids, "values": _lists(self.values), "bases": self.bases,
            "relations": {k: dict(v) for k, v in self.relations.items()}, "skipped": self.skipped,
            "radius": self.radius, "matched": _lists(self.matched),
            "used": {k: dict(v) for k, v in self.used.items()}, "curves": self.curves,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Evaluation:
        """Inverse of `to_dict`."""
        values, matched = (
            {
                arm: {k: np.array([np.nan if x is None else x for x in v]) for k, v in scores.items()}
                for arm, scores in record[key].items()
            }
            for key in ("values", "matched")
        )
        relations, used = ({k: Counter(v) for k, v in record[key].items()} for key in ("relations", "used"))
        skipped = [(a, b) for a, b in record["skipped"]]
        rest = record["radius"], matched, used, record["curves"]
        return cls(values, record["ids"], record["accuracy"], relations, record["bases"], skipped, *rest)


def _lists(values: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, list[float | None]]]:
    return {
        arm: {k: [None if np.isnan(x) else round(float(x), 6) for x in v] for k, v in scores.items()}
        for arm, scores in values.items()
    }


def evaluate(
    data: ImageDataset | str,
    model: Classifier | str,
    *,
    arms: Sequence[Arm] | None = None,
    methods: Iterable[str] = ("gradcam", "layercam"),
    gammas: Iterable[float] = (0.0, 0.6, 1.0),
    scoring: Scoring | None = None,
    layer: str | None = None,
    baselines: bool = True,
    correct_only: bool = True,
    limit: int | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score explanation methods on labelled images.

    Parameters
    ----------
    data
        Dataset or data spec, with labels. Regions come from what it knows: the pixels that differ between classes
        (tinyworld), trait masks, object masks, part points or boxes.
    model
        Classifier or model spec; its classes must be the dataset's.
    arms
        What to compare; by default every method at every gamma with the paper's settings.
    methods, gammas
        Make the default arms.
    scoring
        Metrics and their settings.
    layer
        Layer to explain; the architecture's default otherwise.
    baselines
        Add a random map and a centred Gaussian: what knowing nothing scores.
    correct_only
        Leave out images that the model gets wrong, as the paper does: the target is the label.
    limit
        Only the first images.
    indices
        Only these images.
    batch_size, workers, device
        Of the forward passes.
    progress
        Called with (images done, images).

    Returns
    -------
    Evaluation

    Raises
    ------
    UserError
        No labels, classes that do not fit, no image left to score.
    """
    dataset = open_dataset(data) if isinstance(data, str) else data
    classifier = load_classifier(model, device=device) if isinstance(model, str) else model
    scoring = scoring or Scoring()
    arms = list(arms) if arms is not None else arms_of(methods, gammas)
    labels = _labels(dataset, classifier)
    chosen = [i for i in (range(len(dataset)) if indices is None else indices) if labels[i] >= 0][:limit]
    if not chosen:
        raise UserError("no labelled image to score", where=dataset.name, remedy="give a dataset with labels")
    network = classifier.model.to(device)
    bench = _Bench(dataset, classifier, ArmMaps(classifier, arms, layer, batch_size), scoring, baselines)
    skipped: list[tuple[str, str]] = []
    ids: list[str] = []
    right = seen = 0
    stream = loader(
        dataset, classifier.preprocess, batch_size, workers, device, indices=chosen,
        on_error=lambda i, name, error: skipped.append((name, str(error))),
    )  # fmt: skip
    for positions, x, _ in stream:
        target = torch.as_tensor(labels[positions.numpy()], device=device)
        with torch.inference_mode():
            correct = logits_of(network(x)).argmax(1) == target
        right, seen = right + int(correct.sum()), seen + len(x)
        keep = correct if correct_only else torch.ones_like(correct)
        if keep.any():
            rows = positions[keep.cpu()].tolist()
            bench.score(rows, x[keep].clone(), target[keep])
            ids += [dataset.ids[i] for i in rows]
        if progress is not None:
            progress(seen, len(chosen))
    if not ids:
        remedy = "score all images, or use another model"
        raise UserError("the model classifies no image correctly", where=dataset.name, remedy=remedy)
    bases = {arm.name: arm.base.name for arm in arms}
    return Evaluation(
        bench.values.joined(), ids, right / max(seen, 1), dict(bench.relations), bases, skipped,
        bench.scoring.radius or 0.0, bench.matched.joined(), dict(bench.used), bench.mean_curves(),
    )  # fmt: skip


def _labels(dataset: ImageDataset, classifier: Classifier) -> np.ndarray:
    """Dataset labels as class ids of the model, matched by name."""
    if classifier.class_names is None or list(classifier.class_names) == list(dataset.classes):
        return np.asarray(dataset.labels)
    unknown = [name for name in dataset.classes if name not in classifier.class_names]
    if unknown:
        remedy = "use a model of these classes, or rename the folders"
        given = ", ".join(repr(name) for name in unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise UserError("the model lacks classes of the data", where=dataset.name, given=given, remedy=remedy)
    ids = np.array([classifier.class_names.index(name) for name in dataset.classes] + [-1])
    return ids[np.asarray(dataset.labels)]


class _Scores:
    """Arm -> metric -> values, batch after batch."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, list[Tensor]]] = {}

    def add(self, arm: str, scores: Mapping[str, Tensor]) -> None:
        for name, values in scores.items():
            self.parts.setdefault(arm, {}).setdefault(name, []).append(values.double().cpu())

    def joined(self) -> dict[str, dict[str, np.ndarray]]:
        return {
            arm: {name: torch.cat(values).numpy() for name, values in found.items()}
            for arm, found in self.parts.items()
        }


class _Bench:
    """Scores batches with every arm."""

    def __init__(
        self, dataset: ImageDataset, classifier: Classifier, arms: ArmMaps, scoring: Scoring, baselines: bool
    ) -> None:
        self.dataset, self.classifier, self.arms, self.baselines = dataset, classifier, arms, baselines
        self.grid = arms.grid()
        radius = metrics.half_cell(self.grid, classifier.preprocess.size) if scoring.radius is None else scoring.radius
        self.scoring = replace(scoring, radius=radius)
        self.values, self.matched = _Scores(), _Scores()
        self.curves: dict[str, list[metrics.DeletionCurves]] = defaultdict(list)
        self.relations: dict[str, Counter[str]] = defaultdict(Counter)
        self.used: dict[str, Counter[str]] = defaultdict(Counter)
        # Masks and relations speak of the dataset's classes, which the model may have in another order.
        names = classifier.class_names
        positions = {name: d for d, name in enumerate(dataset.classes)}
        self.known = None if names is None else torch.tensor([positions.get(name, -1) for name in names])

    def score(self, rows: list[int], x: Tensor, target: Tensor) -> None:
        """Add the scores of some images, (B, 3, H, W) and (B,)."""
        size = (x.shape[-2], x.shape[-1])
        with torch.inference_mode():
            logits = logits_of(self.classifier.model(x)).float().clone()
        look_alikes = self._look_alikes(logits, target)
        for rule, classes in look_alikes.items():
            self._relate(self.relations[rule], target, classes)
        near = look_alikes["logit"]
        preprocess = self.classifier.preprocess
        differences = Differences(self.dataset, rows, preprocess, size)
        regions = regions_of(
            self.dataset, rows, self._in_dataset(target), self._in_dataset(near), preprocess, size, differences
        )

        def add(arm: str, maps: Tensor, regions: Mapping[str, Tensor]) -> None:
            curves = self.curves[arm] if "curve_area" in self.scoring.extras else None
            network = self.classifier.model
            self.values.add(arm, score_maps(network, x, target, maps, regions, look_alikes, self.scoring, curves))

        plain: dict[str, Tensor] = {}
        later: list[tuple[Arm, Tensor]] = []
        for shared, arms in self.arms.groups.items():
            maps, references = self.arms.explain(shared, x, target, logits)
            own = regions
            if references.shape[1] and not torch.equal(references, near) and "difference" in regions:
                own = regions | {"difference": differences.union(self._in_dataset(references))}
            for k, arm in enumerate(arms):
                add(arm.name, maps[:, k], own)
                self._relate(self.used[arm.name], target, references)
                if arm.plain:
                    plain[arm.name] = maps[:, k]
                elif "difference" in own:
                    later.append((arm, own["difference"]))
        for arm, region in later:
            if arm.base.name not in plain:  # a comparison needs it, whether or not it is an arm itself
                plain[arm.base.name] = self.arms.explain(arm.base, x, target, logits)[0][:, 0]
            self.matched.add(arm.name, located(plain[arm.base.name], "difference", region, self.scoring))
        if self.baselines:
            generator = torch.Generator().manual_seed(rows[0])
            known_nothing = (random_maps(len(x), size, self.grid, generator), center_gaussian(len(x), size))
            for name, maps in zip(BASELINES, known_nothing):
                add(name, maps.to(x.device), regions)

    def mean_curves(self) -> dict[str, dict[str, list[float]]]:
        """Arm -> class -> mean probability over the images whose map is not empty."""
        found: dict[str, dict[str, list[float]]] = {}
        for arm, parts in self.curves.items():
            target, reference = (torch.cat([p[k] for p in parts]).double().nanmean(0).tolist() for k in (1, 2))
            found[arm] = {"target": target, "look-alike": reference}
        return found

    def _look_alikes(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Classes most similar to the target, by logit and, where the head has rows, by weight; (B, T) each."""
        count = min(self.scoring.references, logits.shape[1] - 1)
        found = {"logit": similar_classes("logit", logits, target, count)}
        if self.arms.cosines is not None:
            found["weight"] = similar_classes("weight", logits, target, count, self.arms.cosines)
        return found

    def _in_dataset(self, classes: Tensor) -> Tensor:
        """Class ids of the model as ids of the dataset, -1 for a class that the dataset lacks."""
        return classes if self.known is None else self.known.to(classes.device)[classes]

    def _relate(self, count: Counter[str], target: Tensor, classes: Tensor) -> None:
        relation = getattr(self.dataset, "relation", None)
        if relation is not None:
            for c, ds in zip(self._in_dataset(target).tolist(), self._in_dataset(classes).tolist()):
                count.update(relation(c, d) for d in ds if d >= 0)

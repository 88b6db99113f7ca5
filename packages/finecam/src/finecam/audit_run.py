"""Does the classifier look where the described marks are? (Finer-CAM, arXiv 2501.11309, section 4.3)

For every image the contrastive map of the classifier (its class against the similar ones) is compared with the map of
an image-text model for each attribute that the class is known by ("red epaulets" against the generic "bird"). Low
agreement is a hint, not a verdict: a spurious cue, a mark missing from the list, or a text the image-text model does
not know.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vfm_core.data import loader
from vfm_core.errors import UserError
from vfm_core.files import write_json
from vfm_core.report import Report
from vfm_core.runs import RunDir

from finecam import render
from finecam.agreement import Attribute, attribute_table, compare_maps, on_common_region, read_attributes
from finecam.classifiers import Classifier, load_classifier
from finecam.data import ImageDataset, open_dataset
from finecam.products import relative_name, store_picture
from finecam.targets import TargetPlan, plan_targets

if TYPE_CHECKING:
    from PIL import Image

    from finecam.render import Array, Box


@dataclass
class AuditSummary:
    """Result of `audit`: one row per attribute, counts, and the report."""

    rows: list[dict[str, Any]]
    done: int
    failed: int
    skipped: int
    report: Path


def audit(
    data: str | os.PathLike[str] | ImageDataset,
    model: str | os.PathLike[str] | Classifier,
    clip: str,
    attributes: str | os.PathLike[str] | Sequence[Attribute],
    out: str | os.PathLike[str],
    *,
    generic: str = "bird",
    templates: Sequence[str] = (),
    target: str | int | None = None,
    references: int | Sequence[str | int] = 3,
    gamma: float = 0.6,
    method: str = "gradcam",
    layer: str | None = None,
    clip_layer: str | None = None,
    loading: dict[str, Any] | None = None,
    clip_loading: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    workers: int = 0,
    limit: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> AuditSummary:
    """Compare what a classifier looks at with where an image-text model finds the marks its classes are known by.

    Parameters
    ----------
    data
        Images: a data spec or an open data set.
    model
        The classifier (see `load_classifier`).
    clip
        Spec of the image-text model.
    attributes
        Rows of class and attribute: a CSV file (see `read_attributes`) or a list.
    out
        Run folder; the same call again finishes what is missing.
    generic
        Word that is subtracted where a row names none.
    templates
        Prompt templates of the image-text model, with ``{}`` for the text.
    target
        Class to explain: ``"label"``, ``"predicted"`` or a name; the label by default where the data has labels.
    references, gamma, method, layer
        Of the classifier's map; `gamma` and `method` also of the attribute's.
    clip_layer
        Layer of the image-text model.
    loading, clip_loading
        Further arguments of `load_classifier` for the two models.
    device, batch_size, workers
        Of the forward passes.
    limit
        At most so many images.
    overwrite
        Start afresh.
    progress
        Wraps the iterable of images; called with it and their number.

    Raises
    ------
    UserError
        Bad files or names, an attribute of a class the classifier does not have.
    """
    dataset = data if isinstance(data, ImageDataset) else open_dataset(data)
    if not isinstance(model, Classifier):
        model = load_classifier(model, device=device, **(loading or {}))
    rows = list(attributes) if not isinstance(attributes, str | os.PathLike) else read_attributes(attributes, generic)
    by_class: dict[int, list[Attribute]] = defaultdict(list)
    for row in rows:
        by_class[model.index(row.name)].append(row)
    texts = list(dict.fromkeys([r.text for r in rows] + [r.generic for r in rows]))
    finder = load_classifier(clip, texts=texts, templates=templates, device=device, **(clip_loading or {}))
    plan = plan_targets(
        model,
        dataset.classes,
        target=target if target is not None else "label" if dataset.classes else "predicted",
        references=references if isinstance(references, int) else list(references),
        used=sorted({int(label) for label in dataset.labels if label >= 0}),
    )
    config = {
        "data": dataset.name,
        "model": model.spec,
        "model_sha256": model.fingerprint,
        "clip": clip,
        "clip_sha256": finder.fingerprint,
        "attributes": [[r.name, r.text, r.generic] for r in rows],
        "templates": list(templates),
        "target": plan.target,
        "references": plan.references,
        "gamma": gamma,
        "method": method,
        "layers": [layer or model.layer, clip_layer or finder.layer],
    }
    pair = _Pair(model, finder, texts, plan, by_class, gamma, method, layer, clip_layer, batch_size)
    skipped = 0
    with RunDir(Path(out), config, overwrite=overwrite, key="image") as run:
        order = [i for i in range(len(dataset))[:limit] if dataset.ids[i] not in run.done]

        def failed(i: int, image: str, error: UserError) -> None:
            run.append_error({"image": image, "error": str(error)})

        stream: Iterable[Any] = loader(
            dataset, model.preprocess, batch_size, workers, device, indices=order, on_error=failed
        )
        batches = -(-len(order) // batch_size)
        for _, x, samples in progress(stream, batches) if progress else stream:
            for result in pair.audit(x, samples, run.path):
                if "error" in result:
                    run.append_error(result)
                else:
                    run.append(result)
        records, errors = run.records(), run.errors()
        skipped = sum(not r["attributes"] for r in records)
        table = attribute_table(records)
        report = _report(run, records, errors, table)
    return AuditSummary(table, len(records) - skipped, len(errors), skipped, report)


class _Pair:
    """The classifier and the image-text model, explaining the same pictures."""

    def __init__(
        self,
        model: Classifier,
        finder: Classifier,
        texts: Sequence[str],
        plan: TargetPlan,
        by_class: dict[int, list[Attribute]],
        gamma: float,
        method: str,
        layer: str | None,
        clip_layer: str | None,
        batch_size: int,
    ) -> None:
        from finecam.explainer import Explainer

        self.model, self.finder, self.plan, self.by_class, self.gamma = model, finder, plan, by_class, gamma
        self.text_id = {text: i for i, text in enumerate(texts)}
        self.looks = Explainer(model.model, layer or model.layer, method, model.reshape, model.class_names, batch_size)
        self.finds = Explainer(
            finder.model, clip_layer or finder.layer, method, finder.reshape, finder.class_names, batch_size
        )

    def audit(self, x: Tensor, samples: Sequence[Any], out: Path) -> list[dict[str, Any]]:
        """One record (or error record) per image; a batch that fails is taken apart."""
        try:
            return self._audit(x, samples, out)
        except ValueError as e:
            if len(samples) == 1:
                return [{"image": samples[0].id, "error": str(e).replace("image 0 of the batch", samples[0].id)}]
            return [r for i, sample in enumerate(samples) for r in self.audit(x[i : i + 1], [sample], out)]

    def _audit(self, x: Tensor, samples: Sequence[Any], out: Path) -> list[dict[str, Any]]:
        targets = [self.plan.target_of(s.id, s.label) for s in samples]
        references: Any = (
            list(self.plan.references) if isinstance(self.plan.references, tuple) else self.plan.references
        )
        options: dict[str, Any] = {"gamma": self.gamma, "normalize": None, "size": None}
        result = self.looks(x, None if targets[0] is None else targets, references, **options)
        wanted = [(i, a) for i, c in enumerate(result.target.tolist()) for a in self.by_class.get(c, ())]
        found: list[Any] = []
        if wanted:
            views = torch.stack([self.finder.preprocess(samples[i].image) for i, _ in wanted]).to(x.device)
            marks = torch.tensor([self.text_id[a.text] for _, a in wanted])
            words = torch.tensor([[self.text_id[a.generic]] for _, a in wanted])
            found = list(self.finds(views, marks, words, **options).maps.cpu().numpy())
        maps = result.maps.cpu().numpy()
        records = []
        for i, sample in enumerate(samples):
            mine = [(a, values) for (row, a), values in zip(wanted, found) if row == i]
            records.append(
                self._record(sample, int(result.target[i]), result.references[i].tolist(), maps[i], mine, out)
            )
        return records

    def _record(
        self, sample: Any, c: int, references: list[int], looks: Array, marks: list[tuple[Attribute, Array]], out: Path
    ) -> dict[str, Any]:
        size, image = sample.image.size, sample.image
        box, mark_box = self.model.preprocess.box(size), self.finder.preprocess.box(size)
        names = [self.model.name(d) for d in references]
        record: dict[str, Any] = {
            "image": sample.id,
            "target": {"id": c, "name": self.model.name(c)},
            "references": names,
            "attributes": [],
        }
        if not marks:
            return record
        image = image.resize(render.fit_within(size, 384), reducing_gap=2.0)
        shape = (image.height, image.width)

        def shown(values: Array, where: Box) -> Image.Image:
            return render.overlay(image, render.to_original(render.minmax(values), where, size, shape))

        tiles = [(image, "image"), (shown(looks, box), "classifier")]
        for attribute, values in marks:
            scores = compare_maps(*on_common_region(looks, box, values, mark_box, size))
            record["attributes"].append({"attribute": attribute.text, "generic": attribute.generic, **scores})
            tiles.append((shown(values, mark_box), f"{attribute.text} (IoU {scores['iou']:.2f})"))
        name = f"overlays/{relative_name(sample.id)}.webp"
        store_picture(out / name, render.panel(tiles, render.title(self.model.name(c), names, self.gamma)))
        return record | {"overlay": name}


def _report(
    run: RunDir, records: Sequence[dict[str, Any]], errors: Sequence[dict[str, Any]], table: list[dict[str, Any]]
) -> Path:
    write_json(run.path / "audit.json", table)
    report = Report("finecam audit", f"{run.config['model']} against {run.config['clip']}, {len(records)} images")
    report.heading("Agreement per attribute")
    report.text(
        "How much the classifier's contrastive map and the attribute's map overlap. Low agreement is a hint, not a "
        "verdict: a spurious cue, a mark that the list lacks, or words that the image-text model does not know. "
        "IoU of two unrelated top regions is about 0.053."
    )
    report.table(table)
    scored = [r for r in records if r["attributes"]]
    lowest = sorted(scored, key=lambda r: max((a["iou"] or 0.0) for a in r["attributes"]))
    if scored:
        report.heading("Least agreement")
        report.gallery([(run.path / r["overlay"], f"{r['image']}: {r['target']['name']}") for r in lowest[:8]])
        report.heading("Most agreement")
        report.gallery([(run.path / r["overlay"], f"{r['image']}: {r['target']['name']}") for r in lowest[:-9:-1]])
    if errors:
        report.heading("Failed images")
        report.table([{"image": e["image"], "reason": e["error"]} for e in errors])
    return report.write(run.report_path)
